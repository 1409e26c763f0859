"""Images and masks together: resizing, random scaling, cropping and mirroring, colours."""

import math

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.data.ordering import mix
from visionpeft.data.segmentation.masks import IGNORED
from visionpeft.data.transforms import LONGEST
from visionpeft.errors import ConfigurationError


class MaskedTransform:
    """What is done to an image and its mask, and then to a batch of images.

    To train, the shorter side becomes `size` times a number drawn from `scale`, a square of `size` is cut anywhere,
    filled up with the mean colour and ignored pixels where the image is smaller, and half of them are mirrored. To
    measure, the shorter side becomes `size` and the mask stays as it is. Masks are resized to the nearest pixel. Of an
    image more than `LONGEST` times as long as wide the longer side becomes `LONGEST` times that.

    Args:
        preprocessing: how the backbone wants its images.
        size: pixels.
        scale: smallest and largest factor while training.
        flip: mirror half of the images while training.
        distort: change brightness, contrast, saturation and hue while training.

    Raises:
        ConfigurationError: a size or factors that are none.
    """

    outside = IGNORED  # value of masks where there is no image

    def __init__(
        self,
        preprocessing: Preprocessing,
        size: int,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: bool = True,
        distort: bool = False,
    ):
        check_sizes(size, scale)
        self.size, self.scale = size, tuple(scale)
        self.interpolation = InterpolationMode(preprocessing.interpolation)
        self.mean = torch.tensor(preprocessing.mean).view(3, 1, 1) * 255
        self.std = torch.tensor(preprocessing.std).view(3, 1, 1) * 255
        fill = {tv_tensors.Image: self.mean.flatten().round().tolist(), tv_tensors.Mask: self.outside}
        steps = [v2.RandomCrop(size, pad_if_needed=True, fill=fill)]
        steps += [v2.RandomHorizontalFlip()] if flip else []
        steps += [v2.RandomPhotometricDistort()] if distort else []
        self._random = v2.Compose(steps)

    def train(self, image: Image.Image, mask: np.ndarray, *seeds: int) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (3, size, size) and class indices int64 (size, size), drawn by `seeds` alone."""
        with torch.random.fork_rng(devices=[]):
            # The CPU generator only: torch.manual_seed would also reset the accelerator's.
            torch.default_generator.manual_seed(int(mix(*seeds)[0] >> 1))
            low, high = self.scale
            factor = low + (high - low) * torch.rand(()).item()
            resized = self._resized(image, max(1, round(self.size * factor)))
            classes = tv_tensors.Mask(torch.from_numpy(mask.copy())[None])
            classes = F.resize(classes, [resized.height, resized.width], interpolation=InterpolationMode.NEAREST_EXACT)
            pixels, classes = self._random(tv_tensors.Image(F.pil_to_tensor(resized)), classes)
        return pixels.as_subclass(torch.Tensor), classes.as_subclass(torch.Tensor)[0]

    def measure(self, image: Image.Image) -> torch.Tensor:
        """uint8 (3, h, w) whose shorter side is `size`."""
        return F.pil_to_tensor(self._resized(image, self.size))

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (..., 3, h, w) -> float32, `(image / 255 - mean) / std`."""
        return images.float().sub_(self.mean).div_(self.std)

    def _resized(self, image: Image.Image, shorter: int) -> Image.Image:
        least, longest = min(image.size), max(image.size)
        if longest > LONGEST * least:
            least, shorter = longest, LONGEST * shorter
        if least == shorter:
            return image
        # multiplied first, as in `covering`; a very long image keeps at least a pixel
        height, width = (max(1, math.floor(side * shorter / least)) for side in (image.height, image.width))
        return F.resize(image, [height, width], interpolation=self.interpolation, antialias=True)


def check_sizes(size: int | None, scale: tuple[float, float]) -> None:
    """Refuse a size of no pixels, and what are no factors.

    Raises:
        ConfigurationError: it is one.
    """
    if size is not None and size < 1:
        raise ConfigurationError(f"size must be at least 1 pixel, or absent, not {size}")
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise ConfigurationError(f"scale {list(scale)} must be two positive factors, the smaller first")
