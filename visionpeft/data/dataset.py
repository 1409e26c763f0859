"""Labelled images as tensors: prepared once, kept in memory while they fit, augmented and normalised batch by batch."""

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info

from visionpeft.caching.named_images import Batch
from visionpeft.data.ordering import EpochSampler
from visionpeft.data.records import Source, rgb_of
from visionpeft.errors import ConfigurationError, DataError


class Transform(Protocol):
    """`normalise(stack of augment(prepare(image)))`, as `ImageTransform` and `ImageViews` do it."""

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """Deterministic part."""

    def augment(self, image: torch.Tensor, *seeds: int) -> torch.Tensor:
        """Random part, drawn by the seeds alone."""

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels to the backbone's input."""


class LabelledDataset(Dataset):
    """Inputs float32 and labels, of a `source`, each input by `_input` and then normalised by the `transform`.

    An index may be a pair `(index, epoch)`. Labels of the source become a tensor (batch, ...) by `as_labels`.
    """

    as_labels: Callable[[list], torch.Tensor] = torch.tensor

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, int | float | torch.Tensor]:
        inputs, labels = self._batch([key])
        return inputs[0], labels[0].item() if labels.ndim == 1 else labels[0]

    def __getitems__(self, keys: list[int | tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor] | DataError:
        """A batch: inputs float32 (B, ...), labels (B, ...). In a worker, an error is returned instead."""
        try:
            return self._batch(keys)
        except DataError as error:
            # PyTorch would wrap an error raised in a worker in the text of its traceback.
            if get_worker_info() is None:
                raise
            return error

    def _batch(self, keys: list[int | tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [key if isinstance(key, tuple) else (key, 0) for key in keys]
        images, names = self._named_inputs(pairs)
        labels = self.as_labels([self.source.labels[index] for index, _ in pairs])
        return (images, labels) if None in names else Batch((images, labels), names)

    def _named_inputs(self, pairs: list[tuple[int, int]]) -> tuple[torch.Tensor, tuple[bytes | None, ...]]:
        """The normalised inputs of pairs (index, epoch), and their names."""
        inputs, names = zip(*(self._named_input(index, epoch) for index, epoch in pairs), strict=True)
        return self.transform.normalise(torch.stack(inputs)), names

    def _named_input(self, index: int, epoch: int) -> tuple[torch.Tensor, bytes | None]:
        """An input, and the name by which it can be known; None where it has none."""
        return self._input(index, epoch), None


class ImageDataset(LabelledDataset):
    """Images float32 (3, H, W), or (V, 3, H, W) of a transform that makes views, and labels.

    An index may be a pair `(index, epoch)`, which seeds the augmentation.

    Args:
        source: labelled images.
        transform: what is done to them.
        seed: seed of the augmentation, together with the epoch and the index.
        cache_bytes: prepared images are kept until they fill this much memory, in each process that loads.
        views: number of different augmentations of each image, which come round again with the epochs; as many as
            epochs when absent.
        as_labels: the labels of a batch, of those of the source: by default class indices int64 (B,).

    Attributes:
        withheld: names of images whose pixels nobody reads, because what they are wanted for is kept. A batch of such
            images alone is not read from files and not augmented: it has names, and NaN for pixels.
    """

    withheld: frozenset[bytes] = frozenset()

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        seed: int = 0,
        cache_bytes: int = 0,
        views: int | None = None,
        as_labels: Callable[[list], torch.Tensor] = torch.tensor,
    ):
        self.source = source
        self.transform = transform
        self.seed = seed
        self.free_bytes = cache_bytes
        self.views = views
        self.as_labels = as_labels
        self.prepared: dict[int, tuple[torch.Tensor, tuple | None]] = {}

    def _named_inputs(self, pairs: list[tuple[int, int]]) -> tuple[torch.Tensor, tuple[bytes | None, ...]]:
        if self.withheld:
            names = tuple(self._name_unread(*pair) for pair in pairs)
            if self.withheld.issuperset(names):
                return torch.full((len(names), 3, *self.transform.size), torch.nan), names
        return super()._named_inputs(pairs)

    def _name_unread(self, index: int, epoch: int) -> bytes | None:
        """The name of an image in an epoch, found without reading it."""
        stamp = self.prepared[index][1] if index in self.prepared else self._stamp(index)
        return self._name(stamp, self._seeds(index, epoch))

    def _named_input(self, index: int, epoch: int) -> tuple[torch.Tensor, bytes | None]:
        image, stamp = self._prepare(index)
        seeds = self._seeds(index, epoch)
        return self.transform.augment(image, *seeds), self._name(stamp, seeds)

    def _seeds(self, index: int, epoch: int) -> tuple[int, int, int]:
        return self.seed, epoch if self.views is None else epoch % self.views, index

    def _stamp(self, index: int) -> tuple | None:
        return self.source.stamp(index) if hasattr(self.source, "stamp") else None

    def _name(self, stamp: tuple | None, seeds: tuple[int, int, int]) -> bytes | None:
        described = self.transform.description() if hasattr(self.transform, "description") else None
        if described is None or stamp is None:
            return None
        # Without augmentation all epochs show the same; with it, what is drawn is a function of the seeds.
        drawn = None if self.transform.augmentation == "none" else seeds
        return hashlib.sha256(f"{described} {stamp} {drawn}".encode()).digest()[:16]

    def _prepare(self, index: int) -> tuple[torch.Tensor, tuple | None]:
        """The prepared image, and which writing of its file it is."""
        if index in self.prepared:
            return self.prepared[index]
        # Before the file is read: one that is changed meanwhile will have another stamp when it is read again.
        stamp = self._stamp(index)
        image = self.transform.prepare(rgb_of(self.source, index))
        if image.nbytes <= self.free_bytes:
            self.free_bytes -= image.nbytes
            self.prepared[index] = image, stamp
        return image, stamp


class ImageLoader(DataLoader):
    """DataLoader over an ImageDataset; errors met in workers are raised as themselves."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in super().__iter__():
            if isinstance(batch, DataError):
                raise batch
            yield batch


class Part(NamedTuple):
    """What one of several processes has of a batch that they cannot share evenly.

    Args:
        own: samples in this process; with none, it computes one that counts for nothing, as all must compute.
        together: samples in all processes.
    """

    own: int
    together: int


class TrainLoader(ImageLoader):
    """ImageLoader over an EpochSampler, whose state lets Lightning resume in the middle of an epoch.

    With `overfit_batches` Lightning puts a sampler of its own in that one's place, of the same images in each epoch.

    Batches are images and labels. Of one that several processes cannot share evenly, the repeats with which the sampler
    evens it out are left out, and a `Part` follows.
    """

    delivered = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, torch.Tensor, Part]]:
        if not isinstance(self.sampler, EpochSampler):
            yield from super().__iter__()
            return
        self.delivered = self.sampler.start
        for batch in super().__iter__():
            images, labels = batch
            first, self.delivered = self.delivered, self.delivered + len(labels)
            part = Part(*self.sampler.fresh(first, self.delivered))
            if part.together == len(labels) * self.sampler.num_replicas:
                yield batch  # whose images may have names
            else:
                kept = part.own or len(labels)
                yield images[:kept], labels[:kept], part

    def state_dict(self) -> dict[str, int]:
        """Epoch, and how many of its samples were delivered, by all processes together."""
        if not isinstance(self.sampler, EpochSampler):
            return {}
        return {"epoch": self.sampler.epoch, "samples": self.delivered * self.sampler.num_replicas}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state_dict` was taken, also with another number of processes.

        Raises:
            ConfigurationError: they cannot share evenly what is left of the epoch.
        """
        if not state or not isinstance(self.sampler, EpochSampler):
            return
        samples, rest = divmod(state["samples"], self.sampler.num_replicas)
        if rest:
            raise ConfigurationError(
                f"{state['samples']} images of epoch {state['epoch'] + 1} were seen when this run stopped, and "
                f"{self.sampler.num_replicas} devices cannot share that evenly; resume with as many devices as before"
            )
        self.sampler.resume = (state["epoch"], samples)


def as_batch(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The `collate_fn` of an ImageLoader: an ImageDataset has already stacked its batch."""
    return batch
