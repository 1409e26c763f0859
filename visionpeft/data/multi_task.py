"""Several data sets that are trained on together, each a task with classes of its own."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from PIL import Image

from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.data.dataset import ImageDataset, LabelledDataset
from visionpeft.data.labels import as_tensor
from visionpeft.data.module import ImageDataModule
from visionpeft.data.ordering import BalancedSampler, EpochSampler
from visionpeft.data.records import ImageSet, Source
from visionpeft.errors import ConfigurationError, DataError
from visionpeft.sites.tasks_of_rows import check_task_names

SPLITS = ("train", "val", "test")


class JoinedSources:
    """Labelled images of several tasks, one task after another; labels count on from task to task.

    Args:
        parts: the images of each task.
        classes: number of classes of each.
    """

    def __init__(self, parts: Sequence[Source], classes: Sequence[int]):
        self.parts = list(parts)
        self.classes = list(classes)
        self.ends = np.cumsum([len(part) for part in parts])
        firsts = _firsts(classes)
        self.labels = [first + label for part, first in zip(parts, firsts, strict=True) for label in part.labels]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """The task of an image, and its index there."""
        task = int(np.searchsorted(self.ends, index, side="right"))
        return task, int(index - (self.ends[task - 1] if task else 0))

    def image(self, index: int) -> Image.Image:
        """RGB image."""
        task, within = self.locate(index)
        return self.parts[task].image(within)

    def name(self, index: int) -> str:
        """Where the image comes from."""
        task, within = self.locate(index)
        return self.parts[task].name(within)


class AlreadyTransformed:
    """The transform of images that have been transformed already."""

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """The images."""
        return images


class JoinedDataset(LabelledDataset):
    """The images of several tasks, each treated as its own data set treats them.

    Args:
        parts: the data set of each task.
        source: their images and labels, joined.
        num_classes: of all tasks.
    """

    transform = AlreadyTransformed()

    def __init__(self, parts: Sequence[ImageDataset], source: JoinedSources, num_classes: int):
        self.parts = parts
        self.source = source
        self.as_labels = partial(as_tensor, kind="classes", num_classes=num_classes)

    def _named_input(self, index: int, epoch: int) -> tuple[torch.Tensor, bytes | None]:
        task, within = self.source.locate(index)
        part = self.parts[task]
        image, name = part._named_input(within, epoch)
        return part.transform.normalise(image[None])[0], name


class MultiTask(ImageDataModule):
    """Several data sets in one training: each is a task, and what is trained is shared by them.

    A class is that of a task: "clipart/birds". A batch has images of all tasks; the label of an image says to which it
    belongs, so that each is judged among the classes of its own task alone. Every data set treats its images (size,
    augmentation, normalisation, seed) as its own options say; what makes batches (`batch_size`, `test_batch_size`,
    `num_workers`, `drop_last`) is said here, and what a data set says of that is not used.

    Args:
        tasks: data set of each task by its name.
        sampling: "balanced": a training epoch has equally many images of every task, those of small ones repeatedly,
            and as many together as there are; "proportional": every image once.
        batch_size: images in a batch, of all tasks together.
        num_workers: processes that load images; 0 loads in the main process.
        test_batch_size: images in a batch of the val and test splits; as `batch_size` when absent.
        drop_last: leave out the last incomplete training batch of each epoch.
        seed: of shuffling; the seed given to Lightning when absent.

    Raises:
        ConfigurationError: no task, a name that is none, or a data set that cannot be one of several.
        DataError: some tasks have a val or test split and others have none, or one has no images to train on.
    """

    def __init__(
        self,
        tasks: dict[str, ImageDataModule],
        sampling: Literal["balanced", "proportional"] = "balanced",
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        test_batch_size: int | None = None,
        drop_last: bool = False,
        seed: int | None = None,
    ):
        if not tasks:
            raise ConfigurationError("MultiTask needs at least one data set: --data.tasks is empty")
        check_task_names(list(tasks))
        if sampling not in ("balanced", "proportional"):
            raise ConfigurationError(f"unknown sampling '{sampling}': choose balanced or proportional")
        for name, data in tasks.items():
            _check_task(name, data)
        self.parts = dict(tasks)
        self.sampling = sampling
        names = [f"{task}/{name}" for task, data in tasks.items() for name in data.class_names]
        about = {
            "dataset": "MultiTask",
            "task": "+".join(tasks),
            "trained_on": {name: data.images.about.get("trained_on") for name, data in tasks.items()},
            "selected_on": {name: data.images.about.get("selected_on") for name, data in tasks.items()},
        }
        untrained = any(data.images.untrained_classes for data in tasks.values())
        images = ImageSet(self._joined(), names, about, untrained_classes=untrained)
        super().__init__(
            images,
            batch_size=batch_size,
            num_workers=num_workers,
            test_batch_size=test_batch_size,
            drop_last=drop_last,
            seed=seed,
        )

    @property
    def tasks(self) -> dict[str, int]:
        """The number of classes of each task, in the order of the labels."""
        return {name: len(data.class_names) for name, data in self.parts.items()}

    @property
    def preprocessing(self) -> Preprocessing | None:
        """As for one data set; set it to the backbone's, and all tasks have it."""
        return self._preprocessing

    @preprocessing.setter
    def preprocessing(self, preprocessing: Preprocessing | None) -> None:
        self._preprocessing = preprocessing
        for data in self.parts.values():
            data.preprocessing = preprocessing

    @property
    def deterministic_views(self) -> int | None:
        """In how many ways images are seen, all tasks together: the least common multiple of theirs."""
        views = [data.deterministic_views for data in self.parts.values()]
        return None if None in views else math.lcm(*views)

    def select_on_test(self) -> None:
        """Select on the test split of every task."""
        for data in self.parts.values():
            data.select_on_test()
        self.images.sources = self._joined()
        self.images.about["selected_on"] = "test"
        self.skipped = dict.fromkeys(self.sources, 0)

    def setup(self, stage: str | None = None) -> None:
        """Check the files of every task. Done once."""
        if self._checked:
            return
        for data in self.parts.values():
            data.setup(stage)
        self.images.sources = self._joined()  # which may be without damaged images now
        self.skipped = {
            split: sum(data.skipped.get(split, 0) for data in self.parts.values()) for split in self.sources
        }
        super().setup(stage)

    def dataset(self, split: str) -> JoinedDataset:
        """The images of "train" (augmented), "val" or "test" of all tasks as the backbone wants them."""
        self._check_ready(split)
        parts = [data.dataset(split) for data in self.parts.values()]
        for part in parts:  # together they keep no more than one data set alone would
            part.free_bytes //= len(parts)
        return JoinedDataset(parts, self.sources[split], len(self.class_names))

    def sampler(self, dataset: JoinedDataset, **options) -> EpochSampler:
        """The order of the training images."""
        if self.sampling == "proportional":
            return EpochSampler(dataset, **options)
        sizes = [len(part) for part in dataset.source.parts]
        return BalancedSampler(np.repeat(np.arange(len(sizes)), sizes).tolist(), **options)

    def description(self) -> dict[str, object]:
        """As for one data set, and what each of the tasks is."""
        described = super().description()
        return {
            **{key: value for key, value in described.items() if key not in (*self._treatment(), "normalisation")},
            "sampled": self.sampling,
            "tasks": {name: data.description() for name, data in self.parts.items()},
        }

    def _joined(self) -> dict[str, Source]:
        """The splits of all tasks."""
        having = {split: [name for name, data in self.parts.items() if split in data.sources] for split in SPLITS}
        for split, names in having.items():
            for name in self.parts:
                if name in names or (not names and split != "train"):
                    continue
                others = f", and {names[0]} has one" if names else ""
                raise DataError(
                    f"task {name!r} has no {split} split{others}; give one to all tasks"
                    + (" or to none" if split != "train" else "")
                )
        classes = [len(data.class_names) for data in self.parts.values()]
        return {
            split: JoinedSources([data.sources[split] for data in self.parts.values()], classes)
            for split, names in having.items()
            if names
        }


def _firsts(classes: Sequence[int]) -> list[int]:
    """The label of the first class of each task."""
    return [0, *accumulate(classes)][:-1]


def _check_task(name: str, data: ImageDataModule) -> None:
    """Refuse a data set that cannot be one of several.

    Raises:
        ConfigurationError: it has videos, a stream, other labels than classes, or batches of its own kind.
    """
    kind = type(data).__name__
    if not isinstance(data, ImageDataModule):
        raise ConfigurationError(f"task {name!r} is a {kind}, which is no data module of images")
    if isinstance(data, MultiTask):
        raise ConfigurationError(f"task {name!r} is a MultiTask itself; name its data sets as tasks of one MultiTask")
    if data.images.kind != "image":
        raise ConfigurationError(
            f"task {name!r} holds {data.images.kind}s; several tasks can be learnt of images alone"
        )
    if getattr(data, "streams", False):
        raise ConfigurationError(
            f"task {name!r} is a stream, which has no order of its own to draw from; use a data set that is fetched as "
            "a whole"
        )
    if data.labels != "classes":
        raise ConfigurationError(
            f"task {name!r} has labels {data.labels!r}; tasks that are learnt together have labels 'classes'"
        )
    for option, usual in (("balanced", False), ("test_views", None), ("test_order", "listed")):
        if getattr(data, option) != usual:
            raise ConfigurationError(
                f"task {name!r} sets {option}, but MultiTask makes the batches; leave it out there"
            )
