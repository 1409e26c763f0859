"""From decoded frames to a clip as the backbone wants it; what is random is drawn once for all frames of a clip."""

from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.data.ordering import mix
from visionpeft.errors import ConfigurationError

LARGEST_MAGNITUDE = 10
MAGNITUDE_BINS = 31


@dataclass(frozen=True)
class ClipAugmentation:
    """What is done to training clips, each time in the same way to all frames of the clip.

    Args:
        crop: "centre"; "jitter": resize so that the short side is 1 to `jitter` times the input's, cut at random;
            "random_resized_crop": cut a share of the area, aspect 3/4 to 4/3, and resize that to the input size.
        jitter: Largest scale of "jitter".
        area: Smallest and largest share of the area that "random_resized_crop" cuts.
        flip: Mirror half of the clips. Off where left and right differ in meaning.
        randaugment: Number of operations of RandAugment (Cubuk et al. 2020, arXiv 1909.13719), before the crop.
        magnitude: Of those operations, 0 to 10.
        erasing: Probability of setting a random rectangle to the mean colour (Zhong et al. 2020, arXiv 1708.04896).

    Raises:
        ConfigurationError: an unknown crop or a number out of range.
    """

    crop: Literal["centre", "jitter", "random_resized_crop"] = "random_resized_crop"
    jitter: float = 1.15
    area: tuple[float, float] = (0.08, 1.0)
    flip: bool = False
    randaugment: int = 0
    magnitude: float = 7
    erasing: float = 0.0

    def __post_init__(self):
        if self.crop not in ("centre", "jitter", "random_resized_crop"):
            raise ConfigurationError(f"unknown crop '{self.crop}': choose centre, jitter or random_resized_crop")
        if self.jitter < 1:
            raise ConfigurationError(f"jitter {self.jitter} must be 1 or more")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ConfigurationError(f"area {self.area} must be two shares above 0 and at most 1, the smaller first")
        if self.randaugment < 0 or not 0 <= self.magnitude <= LARGEST_MAGNITUDE or not 0 <= self.erasing <= 1:
            raise ConfigurationError(
                f"randaugment {self.randaugment} must be 0 or more, magnitude {self.magnitude} 0 to 10 and erasing "
                f"{self.erasing} 0 to 1"
            )


class ClipTransform:
    """`normalise(augment(stack of prepare(frame)))` in training, `normalise(crops(stack of prepare(frame)))` else.

    Frames are resized to cover the input; for training, to cover 1 / 0.875 or `jitter` times the input (256 or 257 for
    224), so that what is kept of a frame does not depend on the size of the video.

    Args:
        preprocessing: Input size, normalisation and interpolation of the backbone's pretraining.
        augmentation: Of training clips; None for clips that are scored.

    Raises:
        ConfigurationError: an interpolation other than nearest, bilinear or bicubic.
    """

    def __init__(self, preprocessing: Preprocessing, augmentation: ClipAugmentation | None = None):
        if preprocessing.interpolation not in ("nearest", "bilinear", "bicubic"):
            raise ConfigurationError(
                f"videos are resized by nearest, bilinear or bicubic interpolation, not {preprocessing.interpolation}"
            )
        self.interpolation = InterpolationMode(preprocessing.interpolation)
        self.augmentation = augmentation
        self.size = list(preprocessing.input_size)
        self.mean = torch.tensor(preprocessing.mean).view(3, 1, 1) * 255
        self.std = torch.tensor(preprocessing.std).view(3, 1, 1) * 255
        self.colour = [float(round(value * 255)) for value in preprocessing.mean]
        crop = "centre" if augmentation is None else augmentation.crop
        share = {"centre": 1.0, "jitter": getattr(augmentation, "jitter", 1.0), "random_resized_crop": 1 / 0.875}[crop]
        self.covered = [int(side * share) for side in self.size]
        self._random = None if augmentation is None else self._random_part(augmentation)

    def prepare(self, frame: Image.Image) -> torch.Tensor:
        """RGB frame -> uint8 (3, h, w), with the aspect of the video, just covering the size wanted."""
        height, width = self.covered
        ratio = max(height / frame.height, width / frame.width)
        size = [max(height, round(frame.height * ratio)), max(width, round(frame.width * ratio))]
        if size != [frame.height, frame.width]:
            frame = F.resize(frame, size, interpolation=self.interpolation, antialias=True)
        return F.pil_to_tensor(frame)

    def augment(self, clip: torch.Tensor, *seeds: int) -> torch.Tensor:
        """Random part, drawn by `seeds` alone: uint8 (T, 3, h, w) -> uint8 (T, 3, H, W)."""
        with torch.random.fork_rng(devices=[]):
            # The CPU generator only: torch.manual_seed would also reset the accelerator's.
            torch.default_generator.manual_seed(int(mix(*seeds)[0] >> 1))
            return self._random(clip)

    def crops(self, clip: torch.Tensor, count: int = 1) -> torch.Tensor:
        """Deterministic part: uint8 (T, 3, h, w) -> (count, T, 3, H, W).

        One crop is the centre, margin // 2; three lie at 0, margin // 2 and margin along the longer side.
        """
        height, width = self.size
        spare_height, spare_width = clip.shape[-2] - height, clip.shape[-1] - width
        places = ((1, 2),) if count == 1 else ((0, 2), (1, 2), (2, 2))
        cuts = []
        for part, whole in places:
            top = spare_height * part // whole if spare_height >= spare_width else spare_height // 2
            left = spare_width * part // whole if spare_width > spare_height else spare_width // 2
            cuts.append(clip[..., top : top + height, left : left + width])
        return torch.stack(cuts)

    def normalise(self, clips: torch.Tensor) -> torch.Tensor:
        """uint8 (..., T, 3, H, W) -> float32 (..., 3, T, H, W), `(pixel / 255 - mean) / std`."""
        return clips.float().sub_(self.mean).div_(self.std).transpose(-4, -3)

    def _random_part(self, chosen: ClipAugmentation) -> v2.Compose:
        """torchvision draws once for all frames of a clip."""
        steps: list[torch.nn.Module] = []
        if chosen.randaugment:
            bins = round(chosen.magnitude / LARGEST_MAGNITUDE * (MAGNITUDE_BINS - 1))
            steps.append(
                v2.RandAugment(
                    chosen.randaugment, bins, MAGNITUDE_BINS, interpolation=InterpolationMode.BILINEAR, fill=self.colour
                )
            )
        if chosen.crop == "centre":
            steps.append(v2.CenterCrop(self.size))
        elif chosen.crop == "jitter":
            steps.append(_JitteredCrop(self.size, chosen.jitter, self.interpolation))
        else:
            steps.append(v2.RandomResizedCrop(self.size, chosen.area, interpolation=self.interpolation, antialias=True))
        if chosen.flip:
            steps.append(v2.RandomHorizontalFlip())
        if chosen.erasing:
            steps.append(v2.RandomErasing(chosen.erasing, value=self.colour))
        return v2.Compose(steps)


class _JitteredCrop(torch.nn.Module):
    """Scale s uniform in 1 to the largest, and a random cut of the input size, in one step.

    Frames come at the largest scale, so the cut is of size `input * largest / s` there.
    """

    def __init__(self, size: list[int], largest: float, interpolation: InterpolationMode):
        super().__init__()
        self.size = size
        self.largest = largest
        self.interpolation = interpolation

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        scale = torch.empty(()).uniform_(1.0, self.largest)
        height, width = (
            min(round(side * float(self.largest / scale)), present)
            for side, present in zip(self.size, clip.shape[-2:], strict=True)
        )
        top = int(torch.randint(clip.shape[-2] - height + 1, ()))
        left = int(torch.randint(clip.shape[-1] - width + 1, ()))
        return F.resized_crop(
            clip, top, left, height, width, self.size, interpolation=self.interpolation, antialias=True
        )
