"""The objects of an image, images with their objects, and the splits that they make."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from visionpeft.data.records import ImageFiles, ImageSet, Source
from visionpeft.errors import DataError


class Objects(NamedTuple):
    """The n objects of an image.

    Pixel (row, column) covers [column, column + 1) x [row, row + 1), so that a mask of one pixel has a box 1 wide.

    Args:
        boxes: float64 (n, 4), x0, y0, x1, y1 in pixels, with x0 < x1 and y0 < y1; they may reach beyond the image.
        labels: class indices int64 (n,), from 0.
        crowd: bool (n,), whether it is a region of many objects, which are not told apart. Nothing is learnt of them,
            and to measure, what is found there is neither right nor wrong.
        areas: float64 (n,), of the mask, or of the box where there is none; the sizes "small" to "large" are of these.
        masks: bool (n, height, width); None where none are asked for.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    masks: np.ndarray | None = None


class ObjectSource(Source, Protocol):
    """Images with their objects."""

    with_masks: bool

    def objects(self, index: int) -> Objects:
        """The objects of an image, in its pixels; with masks if the source has them."""


class ObjectFiles(ImageFiles):
    """Image files with the objects that were read for each.

    Args:
        paths: the images, (n,).
        readers: what gives the objects of each, called with whether masks are asked for, (n,).
        with_masks: whether there are masks.
        numbers: how many objects each image has, crowds not among them, (n,).
    """

    def __init__(self, paths: list[Path], readers: list, with_masks: bool, numbers: list[int]):
        super().__init__(paths, range(len(paths)))  # an index for each, as labels of one number there are none
        self.readers = list(readers)
        self.with_masks = with_masks
        self.numbers = list(numbers)

    def objects(self, index: int) -> Objects:
        """The objects of an image.

        Raises:
            DataError: the annotation cannot be used.
        """
        return self.readers[index](self.with_masks)

    def subset(self, indices: np.ndarray) -> "ObjectFiles":
        """The images at `indices`."""
        own = ([values[i] for i in indices] for values in (self.paths, self.readers, self.numbers))
        paths, readers, numbers = own
        return ObjectFiles(paths, readers, self.with_masks, numbers)


@dataclass
class ObjectSet(ImageSet):
    """Images with objects, before anything is done to them."""

    def check(self) -> None:
        """Check that there is something to learn.

        Raises:
            DataError: an empty split, one without any object, or no classes.
        """
        for split, source in self.sources.items():
            if len(source) == 0:
                raise DataError(f"the {split} split holds no images")
            if isinstance(source, ObjectFiles) and not sum(source.numbers):
                raise DataError(f"none of the {len(source)} images of the {split} split has an object")
        if not self.class_names:
            raise DataError("detection needs at least one class of objects, and the data has none")


def check_apart(sources: dict[str, ObjectFiles]) -> None:
    """Raise DataError when an image is in two splits."""
    seen: dict[Path, str] = {}
    for split, source in sources.items():
        for path in source.paths:
            if seen.setdefault(path, split) != split:
                raise DataError(f"image {path} is in the {seen[path]} and in the {split} split")


def box_of(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """x0, y0, x1, y1 around the pixels of a mask (height, width), None of an empty one."""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def objects_of(
    boxes: Sequence,
    labels: Sequence[int],
    crowd: Sequence[bool] | None = None,
    areas: Sequence[float] | None = None,
    masks: np.ndarray | None = None,
) -> Objects:
    """Objects of lists, none of them crowds and with the areas of their boxes if nothing else is said."""
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    sides = boxes[:, 2:] - boxes[:, :2]
    return Objects(
        boxes,
        np.array(labels, np.int64),
        np.zeros(len(boxes), bool) if crowd is None else np.array(crowd, bool),
        sides.prod(1) if areas is None else np.array(areas, np.float64),
        masks,
    )
