"""Images that come one after the other and cannot be looked up, as batches in the processes that load them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import count, islice

import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from visionpeft.data.class_index import out_of_range, positions
from visionpeft.data.dataset import Transform
from visionpeft.data.images import decode_image
from visionpeft.data.labels import one_class
from visionpeft.data.ordering import mix
from visionpeft.errors import ConfigurationError, DataError

Part = int | tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Share:
    """The part of a stream that is read in one place.

    Args:
        rank: which of several processes that train together.
        processes: how many there are.
        worker: which of the workers that load for this process.
        workers: how many there are.
    """

    rank: int = 0
    processes: int = 1
    worker: int = 0
    workers: int = 1


@dataclass(frozen=True)
class Shuffle:
    """How a stream is shuffled: shards by the seed, then images in a buffer.

    Args:
        seed: the same in all processes, so that their shares stay apart.
        buffer: images, not decoded yet, from which the next one is drawn.
    """

    seed: int
    buffer: int


@dataclass(frozen=True)
class Encoded:
    """An image as it is stored.

    Args:
        content: the bytes of its file.
        label: as it is stored.
        where: what messages call it.
    """

    content: bytes
    label: object
    where: str

    def decode(self) -> Image.Image:
        """RGB image; raises DataError when it is damaged."""
        return decode_image(BytesIO(self.content), f"image {self.where}", "repair it, or build the shard without it")


class Stream(ABC):
    """Labelled images of one split that can only be read in order.

    Args:
        size: how many there are; None as long as that is not known.
    """

    def __init__(self, size: int | None):
        self.size = size

    def __len__(self) -> int:
        if self.size is None:
            raise TypeError("this stream does not say how many images it holds")
        return self.size

    @property
    def labels(self) -> Iterator[int]:
        """Not known before everything has been read: asking for the first one raises ConfigurationError."""
        raise ConfigurationError(
            "the labels of a stream are known only when it is read, so nothing can be balanced by them before; give "
            "weights as a list, or read a data set that can be looked up (--data.source hfds/...)"
        )
        yield

    @abstractmethod
    def check(self) -> Encoded:
        """Look at what can be seen before training, and return the first image.

        Raises:
            DataError: something is missing or cut, or there is no image, or it has no label.
        """

    @abstractmethod
    def parts(self, processes: int) -> int:
        """Into how many parts one of several processes can share its images among workers."""

    @abstractmethod
    def samples(self, share: Share, shuffle: Shuffle | None = None) -> Iterator[Encoded]:
        """The images of a share: those of all shares together are all images, each once.

        Raises:
            DataError: what is read is missing, cut, or not as it should be.
        """


class ClassOf:
    """The class index of a label as it is stored: an index, or a name.

    Args:
        names: of the classes.
    """

    def __init__(self, names: list[str]):
        self.names = names
        self.positions = positions(names)

    def __call__(self, sample: Encoded) -> int:
        """The class of an image; raises DataError when it has none, or one beyond the classes."""
        try:
            label = one_class(sample.label)
        except ValueError as error:
            raise DataError(f"{sample.where} {error}, not {sample.label!r}") from None
        if label not in self.positions:
            raise out_of_range(label, sample.where, self.names)
        return self.positions[label]


class StreamDataset(IterableDataset):
    """Batches of the images of a stream, in each of the workers that load for one process.

    A batch is (images float32 (B, ...), class indices int64 (B,)); the last one of a worker may be smaller. Those
    that are to be skipped, because a resumed run has seen them, are not decoded: the number of their images stands in
    their place. In a worker, an error is yielded instead of raised.

    Args:
        stream: the images.
        transform: what is done to them.
        class_of: the class of each.
        batch_size: images in a batch.
        rank: which of several processes this is.
        processes: how many there are.
        seed: of order and augmentation.
        buffer: images from which the next is drawn; None keeps the order.
    """

    def __init__(
        self,
        stream: Stream,
        transform: Transform,
        class_of: Callable[[Encoded], int],
        *,
        batch_size: int,
        rank: int = 0,
        processes: int = 1,
        seed: int = 0,
        buffer: int | None = None,
    ):
        self.stream = stream
        self.transform = transform
        self.class_of = class_of
        self.batch_size = batch_size
        self.rank = rank
        self.processes = processes
        self.seed = seed
        self.buffer = buffer
        self.epoch = 0
        self.turn = 0  # how many shares this process has read to their end in the epoch
        self.skipped = 0  # batches of each worker

    def set_epoch(self, epoch: int) -> None:
        """Another order and augmentation for each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Part | DataError]:
        worker = get_worker_info()
        if worker is None:
            yield from self._parts(Share(self.rank, self.processes))
            return
        try:
            yield from self._parts(Share(self.rank, self.processes, worker.id, worker.num_workers))
        except DataError as error:
            # PyTorch would wrap an error raised in a worker in the text of its traceback.
            yield error

    def _parts(self, share: Share) -> Iterator[Part]:
        shuffle = None
        if self.buffer is not None:
            shuffle = Shuffle(int(mix(self.seed, self.epoch, self.turn)[0] >> 33), self.buffer)
        samples = enumerate(self.stream.samples(share, shuffle))
        for number in count():
            batch = list(islice(samples, self.batch_size))
            if not batch:
                return
            yield len(batch) if number < self.skipped else self._read(batch, share)

    def _read(self, batch: list[tuple[int, Encoded]], share: Share) -> tuple[torch.Tensor, torch.Tensor]:
        # The place of an image in the whole stream is not known, so its augmentation is seeded by where it is read.
        seeds = (self.seed, self.epoch, self.turn, share.rank * share.workers + share.worker)
        classes = [self.class_of(sample) for _, sample in batch]
        images = [
            self.transform.augment(self.transform.prepare(sample.decode()), *seeds, position)
            for position, sample in batch
        ]
        return self.transform.normalise(torch.stack(images)), torch.tensor(classes)
