"""Labelled image files: what a list or a folder of images becomes, and the checks every data set passes."""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path, PurePath
from typing import Protocol

import numpy as np
from PIL import Image

from visionpeft.data.images import check_image, open_image
from visionpeft.data.labels import Labels, check_numbers, in_words, parts_of
from visionpeft.errors import DataError

SECOND = 10**9  # in nanoseconds
CHECKED = 2000  # files of a split that are looked at before training, which takes a second at most


class Source(Protocol):
    """Labelled images of one split; labels as `ImageSet.labels` says."""

    labels: Sequence[int] | Sequence[tuple[int, ...]] | Sequence[float]

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """RGB image."""

    def name(self, index: int) -> str:
        """Where the image comes from, for reports."""

    def subset(self, indices: np.ndarray) -> "Source":
        """The images at `indices`."""


def size_of(source: Source | Sequence) -> int | None:
    """How many images a split has; None of a stream that does not say."""
    try:
        return len(source)
    except TypeError:
        return None


def rgb_of(source: Source, index: int) -> Image.Image:
    """An image of a source, which may be anybody's.

    Raises:
        DataError: it is not RGB.
    """
    image = source.image(index)
    if not isinstance(image, Image.Image) or image.mode != "RGB":
        found = (
            f"a Pillow image of mode {image.mode}" if isinstance(image, Image.Image) else f"a {type(image).__name__}"
        )
        raise DataError(
            f"image {source.name(index)} is {found}, and {type(source).__name__}.image must give Pillow images of mode "
            "RGB: add .convert('RGB'), after scaling what has more than 8 bits"
        )
    return image


@dataclass(frozen=True)
class Row:
    """One line of an annotation file: image path as written, label as read, and where it stands."""

    path: str
    label: int | str | float | tuple[int | str, ...]
    where: str


class Files:
    """Files with labels, called `kind` in messages.

    Args:
        paths: where they are, (n,).
        labels: class indices, tuples of them, or numbers, (n,).
    """

    kind: str

    def __init__(self, paths: Sequence[Path], labels: Sequence[int] | Sequence[tuple[int, ...]] | Sequence[float]):
        self.paths = list(paths)
        self.labels = list(labels)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Path of the image or video."""
        return str(self.paths[index])

    def check_files(self) -> None:
        """Find damaged files without decoding them; of a large split, among `CHECKED` drawn once and for all.

        Raises:
            DataError: one is damaged.
        """
        count = len(self)
        for index in range(count) if count <= CHECKED else np.random.default_rng(0).permutation(count)[:CHECKED]:
            self.check_file(index)

    def check_file(self, index: int) -> None:
        """Raise DataError where a file is found to be damaged; which kinds can be looked at cheaply, they say."""


class ImageFiles(Files):
    """Image files with labels."""

    kind = "image"

    def image(self, index: int) -> Image.Image:
        """RGB image; raises DataError when the file is missing or damaged."""
        return open_image(self.paths[index])

    def check_file(self, index: int) -> None:
        """Raise DataError where an image is damaged, as far as its first and last bytes say."""
        if type(self).image is ImageFiles.image:  # another class may make its images of something else
            check_image(self.paths[index])

    def stamp(self, index: int) -> tuple | None:
        """Which file `image` would read and which writing of it, None where it cannot be known.

        Two stamps are equal only if the file was not written, replaced or exchanged between them. (On Windows, which
        does not tell when a file was last changed, one whose time of writing was set back would pass.)
        """
        if type(self).image is not ImageFiles.image:  # another class may make its images of something else
            return None
        try:
            status = os.stat(self.paths[index])
        except OSError:
            return None
        # Clocks of file systems tick. A file that was written within the last tick may be written again in the same.
        whole_seconds = status.st_mtime_ns % SECOND == status.st_ctime_ns % SECOND == 0
        if time.time_ns() - status.st_ctime_ns < (2 * SECOND if whole_seconds else SECOND // 50):
            return None
        # The time of the last change of any kind cannot be set back, as that of the last writing can.
        times = status.st_mtime_ns, status.st_ctime_ns
        return str(self.paths[index]), status.st_dev, status.st_ino, status.st_size, *times

    def subset(self, indices: np.ndarray) -> "ImageFiles":
        """The images at `indices`."""
        return ImageFiles([self.paths[i] for i in indices], [self.labels[i] for i in indices])

    def readable(self) -> list[int]:
        """Indices of the images that can be opened; reads every one."""
        return [index for index in range(len(self)) if self._can_open(index)]

    def _can_open(self, index: int) -> bool:
        try:
            self.image(index)
        except DataError:
            return False
        return True

    def check_exist(self) -> None:
        """Raise DataError naming the first file that does not exist."""
        for path in self.paths:
            if not path.is_file():
                raise DataError(f"image file {path} does not exist")


def path_inside(root: Path, path: str, where: str, kind: str = "image") -> Path:
    """`root / path`, refused when the path as written leaves the root.

    Raises:
        DataError: the path is absolute or contains `..`.
    """
    written = PurePath(path)
    if written.is_absolute() or ".." in written.parts:
        raise DataError(f"{where}: the path '{path}' leaves the {kind} folder {root}; use paths inside it")
    return root / written


def without_duplicates(rows: Iterable[Row], kind: str = "image") -> list[Row]:
    """Rows with repeated lines kept once, in order; `./a.png` is `a.png`.

    Raises:
        DataError: one image has two labels.
    """
    first: dict[str, Row] = {}
    for row in rows:
        earlier = first.setdefault(os.path.normpath(row.path), row)
        if earlier.label != row.label:
            raise DataError(
                f"{row.where}: {kind} '{row.path}' has label '{in_words(row.label)}' here and "
                f"'{in_words(earlier.label)}' in {earlier.where}"
            )
    return list(first.values())


def check_disjoint(splits: dict[str, list[Row]], kind: str = "image") -> None:
    """Raise DataError when an image is listed in two of the splits."""
    seen: dict[str, str] = {}
    for split, rows in splits.items():
        for row in rows:
            if (other := seen.setdefault(os.path.normpath(row.path), split)) != split:
                raise DataError(f"{row.where}: {kind} '{row.path}' is also in the {other} split")


@dataclass
class ImageSet:
    """Labelled images (or videos), before anything is done to them.

    Args:
        sources: splits by name: "train", and optionally "val" (for selection) and "test"; or "test" alone.
        class_names: names in the order of the labels; none of numbers.
        about: first entries of a run's record: data set, task, what is trained on and selected on.
        notes: remarks for that record, such as sizes that differ from the published ones.
        untrained_classes: allow classes that have no training image.
        kind: what they are called in messages.
        labels: what a label is: a class index ("classes"), a tuple of those that apply ("several"), or a "number".
    """

    sources: dict[str, Source]
    class_names: list[str]
    about: dict[str, object]
    notes: list[str] = field(default_factory=list)
    untrained_classes: bool = False
    kind: str = "image"
    labels: Labels = "classes"

    def check(self) -> None:
        """Check that there is something to learn, and that what is scored can be learnt.

        Raises:
            DataError: an empty split, fewer than two classes, a label that is no class index, or, where there is a
                train split, a class without a training image; a split in which no image has any of several labels, or
                all have the same number.
        """
        names = self.class_names
        for split, source in self.sources.items():
            if len(source) == 0:
                raise DataError(f"the {split} split holds no {self.kind}s")
            if self.labels == "number" and split != "val":  # of which no R2 is taken
                check_numbers(source.labels, split, self.kind)
        if self.labels == "number":
            return
        if len(names) < 2:
            raise DataError(f"a data set needs at least two classes, found {len(names)}: {', '.join(names)}")
        present = {split: self._classes_in(source.labels, split) for split, source in self.sources.items()}
        for split, found in present.items():
            if not found:
                raise DataError(f"no {self.kind} of the {split} split has a label; of these nothing can be measured")
        if self.untrained_classes or "train" not in self.sources:
            return
        trained = present["train"]
        for split, found in present.items():
            unseen = sorted(found - trained)
            if unseen:
                raise DataError(
                    f"class '{names[unseen[0]]}' is in the {split} split and has no {self.kind} in the train split"
                )
        missing = sorted(set(range(len(names))) - trained)
        if missing:
            raise DataError(f"class '{names[missing[0]]}' has no {self.kind} in the train split")

    def _classes_in(self, labels: Iterable, split: str) -> set[int]:
        """The classes that labels name."""
        found = set()
        for label in labels:
            for part in parts_of(label):
                if not isinstance(part, Integral) or not 0 <= part < len(self.class_names):
                    form = "tuples of class indices" if self.labels == "several" else "class indices"
                    raise DataError(
                        f"the {split} split has the label {label!r}; labels {self.labels!r} are {form}, whole numbers "
                        f"from 0 to {len(self.class_names) - 1}"
                    )
                found.add(int(part))
        return found
