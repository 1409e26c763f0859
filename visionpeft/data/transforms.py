"""From a decoded image to the backbone's input: a deterministic part (cacheable), a random part, normalisation."""

import math
from typing import Literal

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from visionpeft.backbones.preprocessing import Preprocessing, Resize
from visionpeft.data.ordering import mix
from visionpeft.errors import ConfigurationError

Augmentation = Literal["none", "crop_flip", "random_resized_crop"]
# Resized by its shorter side, a strip of 1 x 100,000 pixels would fill the memory.
LONGEST = 16  # times the shorter side that the longer one may have
CROP_AREA = (0.08, 1.0)  # shares of the area that are cut where nothing else is said, as in most papers


class ImageTransform:
    """`normalise(stack of augment(prepare(image)))`.

    Args:
        preprocessing: input size, normalisation, interpolation and crop share of the backbone's pretraining.
        resize: "squash" resizes to the input size whatever the aspect; "crop" resizes until the image covers
            `input size / crop_pct` and cuts out the centre. Of an image more than `LONGEST` times as long as wide
            that is the part in the middle.
        augmentation: "none"; "crop_flip": resize to `input size / min(crop_pct, 0.875)` (256 for 224; squashed or
            covering, as `resize` says), cut at random, flip half of the images; "random_resized_crop": cut a share of
            the area with aspect 3/4 to 4/3, resize that to the input size, flip half of the images.
        crop_area: smallest and largest share of the area that "random_resized_crop" cuts.

    Raises:
        ConfigurationError: an unknown option or interpolation, or shares that are none.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        resize: Resize = "squash",
        augmentation: Augmentation = "none",
        crop_area: tuple[float, float] = CROP_AREA,
    ):
        if resize not in ("squash", "crop"):
            raise ConfigurationError(f"unknown resize '{resize}': choose squash or crop")
        if augmentation not in ("none", "crop_flip", "random_resized_crop"):
            raise ConfigurationError(
                f"unknown augmentation '{augmentation}': choose none, crop_flip or random_resized_crop"
            )
        check_crop_area(crop_area)
        try:
            self.interpolation = InterpolationMode(preprocessing.interpolation)
        except ValueError as error:
            names = ", ".join(mode.value for mode in InterpolationMode)
            raise ConfigurationError(
                f"unknown interpolation '{preprocessing.interpolation}': choose one of {names}"
            ) from error
        self.resize = resize
        self.augmentation = augmentation
        self.size = list(preprocessing.input_size)
        self.crop_pct = preprocessing.crop_pct
        self.mean = torch.tensor(preprocessing.mean).view(3, 1, 1) * 255
        self.std = torch.tensor(preprocessing.std).view(3, 1, 1) * 255
        cut = (
            v2.RandomResizedCrop(self.size, tuple(crop_area), interpolation=self.interpolation)
            if augmentation == "random_resized_crop"
            else v2.RandomCrop(self.size)
        )
        self._random = v2.Compose([cut, v2.RandomHorizontalFlip()])

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """Deterministic part: RGB image -> uint8 (3, h, w), of the input size unless a random cut follows."""
        if self.resize == "crop" and self.augmentation != "random_resized_crop":
            image = middle(image)
        if self.augmentation == "none":
            if self.resize == "squash":
                image = self._resized(image, self.size)
            else:
                image = F.center_crop(self._resized(image, self._scaled(image, self.crop_pct)), self.size)
        elif self.augmentation == "crop_flip":
            image = self._resized(image, self._scaled(image, min(self.crop_pct, 0.875)))
        return F.pil_to_tensor(image)

    def augment(self, image: torch.Tensor, *seeds: int) -> torch.Tensor:
        """Random part, drawn by `seeds` alone: uint8 (3, h, w) -> uint8 (3, H, W)."""
        if self.augmentation == "none":
            return image
        with torch.random.fork_rng(devices=[]):
            # The CPU generator only: torch.manual_seed would also reset the accelerator's.
            torch.default_generator.manual_seed(int(mix(*seeds)[0] >> 1))
            # As a Pillow image, because Pillow has all interpolations and is what the backbones were trained with.
            return F.pil_to_tensor(self._random(F.to_pil_image(image)))

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (..., 3, H, W) -> float32 (..., 3, H, W), `(image / 255 - mean) / std`."""
        return images.float().sub_(self.mean).div_(self.std)

    def description(self) -> str | None:
        """All that decides what becomes of an image, seeds apart; None of a class that may do something else."""
        if type(self) is not ImageTransform:
            return None
        scale = self.mean.flatten().tolist(), self.std.flatten().tolist()
        random = None if self.augmentation == "none" else self._random
        return f"{self.resize} {self.size} {self.crop_pct} {self.interpolation} {scale} {self.augmentation} {random}"

    def _resized(self, image: Image.Image, size: list[int]) -> Image.Image:
        return F.resize(image, size, interpolation=self.interpolation, antialias=True)

    def _scaled(self, image: Image.Image, share: float) -> list[int]:
        """Size (h, w) at which `input size` is `share` of it: squashed to that, or just covering it."""
        height, width = (math.floor(side / share) for side in self.size)
        if self.resize == "squash":
            return [height, width]
        return covering(image.height, image.width, height, width)


def middle(image: Image.Image) -> Image.Image:
    """The part in the middle of an image that is more than `LONGEST` times as long as wide, and any other as it is.

    As much is cut away at both ends, so that the centre stays where it is.
    """
    longest = LONGEST * min(image.size)
    left, top = ((side - longest + 1) // 2 if side > longest else 0 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


def check_crop_area(area: tuple[float, float]) -> None:
    """Refuse what is not a smallest and a largest share of an area.

    Raises:
        ConfigurationError: a share of 0 or less or above 1, or the larger one first.
    """
    if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
        raise ConfigurationError(f"crop_area {list(area)} must be two shares above 0 and at most 1, the smaller first")


def covering(height: int, width: int, least_height: int, least_width: int) -> list[int]:
    """Size (h, w) of an image resized with its aspect until it just covers another size.

    The side that does not fit exactly is cut down to whole pixels, floor(least * long / short), as torchvision's
    `Resize` does; multiplying first, because `long * (least / short)` is rounded twice and may fall one pixel short.

    Args:
        height: of the image.
        width: of the image.
        least_height: to be covered.
        least_width: to be covered.
    """
    if least_height * width >= least_width * height:  # the height decides
        return [least_height, least_height * width // height]
    return [least_width * height // width, least_width]
