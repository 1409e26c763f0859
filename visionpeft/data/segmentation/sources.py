"""Images with their masks, and the splits that they make."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from visionpeft.data.images import EXTENSIONS, check_image
from visionpeft.data.records import ImageFiles, ImageSet, Source
from visionpeft.data.segmentation.masks import MaskReader, size_of_image
from visionpeft.errors import DataError


class MaskedSource(Source, Protocol):
    """Images with a class for each pixel."""

    def mask(self, index: int) -> np.ndarray:
        """Class indices int64 (height, width) of an image, `IGNORED` where a pixel counts nowhere."""


class MaskFiles(ImageFiles):
    """Image files with a mask file each.

    Args:
        paths: the images, (n,).
        masks: their masks, (n,).
        reader: what the values of masks mean.
    """

    def __init__(self, paths: Sequence[Path], masks: Sequence[Path], reader: MaskReader):
        super().__init__(paths, range(len(paths)))  # an index for each, as labels of one number there are none
        self.masks = list(masks)
        self.reader = reader

    def mask(self, index: int) -> np.ndarray:
        """Class indices (height, width).

        Raises:
            DataError: the mask cannot be read, or has another size than its image.
        """
        classes = self.reader.read(self.masks[index])
        self._check_size(index, classes.shape[::-1])
        return classes

    def check_file(self, index: int) -> None:
        """Raise DataError where an image is damaged or its mask, or that has another size."""
        super().check_file(index)
        if self.masks[index].suffix.lower() not in EXTENSIONS:  # such as SBD's, files of MATLAB
            return
        check_image(self.masks[index])
        self._check_size(index, size_of_image(self.masks[index]))

    def _check_size(self, index: int, size: tuple[int, int]) -> None:
        width, height = size_of_image(self.paths[index])
        if size != (width, height):
            raise DataError(
                f"mask {self.masks[index]} has {size[0]} x {size[1]} pixels, but its image {self.paths[index]} has "
                f"{width} x {height}; masks must have the size of their images: correct it, or set skip_corrupt to "
                "leave it out"
            )

    def subset(self, indices: np.ndarray) -> "MaskFiles":
        """The images at `indices`."""
        return type(self)([self.paths[i] for i in indices], [self.masks[i] for i in indices], self.reader)

    def check_exist(self) -> None:
        """Raise DataError naming the first image or mask that does not exist."""
        super().check_exist()
        for path in self.masks:
            if not path.is_file():
                raise DataError(f"mask file {path} does not exist")

    def _can_open(self, index: int) -> bool:
        try:
            self.mask(index)
        except DataError:
            return False
        return super()._can_open(index)


@dataclass
class MaskSet(ImageSet):
    """Images with masks, before anything is done to them."""

    def check(self) -> None:
        """Check that there is something to learn; which classes occur, only the masks would say.

        Raises:
            DataError: an empty split, or fewer than two classes.
        """
        for split, source in self.sources.items():
            if len(source) == 0:
                raise DataError(f"the {split} split holds no images")
        if len(self.class_names) < 2:
            raise DataError(
                f"segmentation needs at least two classes, the background among them, not {len(self.class_names)}"
            )
