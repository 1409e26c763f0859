"""From decoded frames to a clip as the backbone wants it; what is random is drawn once for all frames of a clip."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.data.ordering import mix
from visionpeft.data.transforms import covering
from visionpeft.errors import ConfigurationError

LARGEST_MAGNITUDE = 10
MAGNITUDE_BINS = 31
Resizing = Literal["pillow", "tensor"]


@dataclass(frozen=True)
class ClipAugmentation:
    """What is done to training clips, each time in the same way to all frames of the clip.

    Args:
        crop: "centre"; "jitter": resize so that the short side is 1 to `jitter` times the input's, cut at random;
            "random_resized_crop": cut a share of the area, aspect 3/4 to 4/3, and resize that to the input size.
        jitter: largest scale of "jitter".
        area: smallest and largest share of the area that "random_resized_crop" cuts.
        flip: mirror half of the clips. Off where left and right differ in meaning.
        randaugment: number of operations of RandAugment (Cubuk et al. 2020, arXiv 1909.13719), before the crop.
        magnitude: of those operations, 0 to 10.
        policy: RandAugment of timm in place of that of torchvision, such as "rand-m7-n4-mstd0.5-inc1" (ST-Adapter on
            Something-Something): 4 operations, each with probability .5 and a magnitude N(7, .5^2).
        erasing: probability of setting a random rectangle to the mean colour (Zhong et al. 2020, arXiv 1708.04896).

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
    policy: str | None = None

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
        if self.policy is not None:
            if self.randaugment:
                raise ConfigurationError("policy and randaugment are two kinds of RandAugment; leave one out")
            _ = rand_augment_of(self.policy, 224, "bicubic")


def rand_augment_of(policy: str, side: int, interpolation: str):
    """timm's RandAugment on Pillow images whose short side has so many pixels.

    Raises:
        ConfigurationError: it is no policy of timm's.
    """
    filters = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}
    chosen = {
        "translate_const": int(side * 0.45),
        "interpolation": filters.get(interpolation, Image.Resampling.BICUBIC),
    }
    try:
        if not policy.startswith("rand-"):
            raise ValueError("it begins with another word than rand")
        for part in policy.split("-")[1:]:
            if not part.startswith("t") and not any(map(str.isdigit, part)):
                raise ValueError(f"'{part}' has no number")  # timm would ignore it
        return rand_augment_transform(policy, chosen)
    except (AssertionError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"policy '{policy}' is no RandAugment of timm's ({error}); one is 'rand-m7-n4-mstd0.5-inc1'"
        ) from error


class ClipTransform:
    """`normalise(augment(stack of prepare(frame)))` in training, `normalise(crops(stack of prepare(frame)))` else.

    Frames are resized to cover the input; for training, to cover 1 / 0.875 or `jitter` times the input (256 or 257 for
    224), so that what is kept of a frame does not depend on the size of the video. With `resizing="tensor"` frames for
    training keep their size until they are cut, and all are resized by torch's `interpolate` without antialiasing, to a
    width that is cut down to whole pixels, and kept as float32, which may lie outside of 0 to 255: as in ST-Adapter's
    code, for those who want its numbers. By default they are resized by Pillow, antialiased and to the nearest pixel.

    Args:
        preprocessing: input size, normalisation and interpolation of the backbone's pretraining.
        augmentation: of training clips; None for clips that are scored.
        resizing: "pillow", or "tensor" as above.

    Raises:
        ConfigurationError: an interpolation other than nearest, bilinear or bicubic.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        augmentation: ClipAugmentation | None = None,
        resizing: Resizing = "pillow",
    ):
        if resizing not in ("pillow", "tensor"):
            raise ConfigurationError(f"unknown resizing '{resizing}' of frames: choose pillow or tensor")
        if preprocessing.interpolation not in ("nearest", "bilinear", "bicubic"):
            raise ConfigurationError(
                f"videos are resized by nearest, bilinear or bicubic interpolation, not {preprocessing.interpolation}"
            )
        self.interpolation = InterpolationMode(preprocessing.interpolation)
        self.augmentation = augmentation
        self.resizing = resizing
        self.size = list(preprocessing.input_size)
        self.mean = torch.tensor(preprocessing.mean).view(3, 1, 1) * 255
        self.std = torch.tensor(preprocessing.std).view(3, 1, 1) * 255
        self.colour = [float(round(value * 255)) for value in preprocessing.mean]
        crop = "centre" if augmentation is None else augmentation.crop
        share = {"centre": 1.0, "jitter": getattr(augmentation, "jitter", 1.0), "random_resized_crop": 1 / 0.875}[crop]
        self.covered = [int(side * share) for side in self.size]
        self._random = None if augmentation is None else self._random_part(augmentation)

    def prepare(self, frame: Image.Image) -> torch.Tensor:
        """RGB frame -> uint8 (3, h, w), with the aspect of the video, just covering the size wanted.

        With `resizing="tensor"` it is float32, or in training the frame as it is.
        """
        if self.resizing == "tensor":
            pixels = F.pil_to_tensor(frame)
            return pixels if self.augmentation is not None else cover(pixels, self.size, self.interpolation)
        height, width = self.covered
        ratio = max(height / frame.height, width / frame.width)
        size = [max(height, round(frame.height * ratio)), max(width, round(frame.width * ratio))]
        if size != [frame.height, frame.width]:
            frame = F.resize(frame, size, interpolation=self.interpolation, antialias=True)
        return F.pil_to_tensor(frame)

    def augment(self, clip: torch.Tensor, *seeds: int) -> torch.Tensor:
        """Random part, drawn by `seeds` alone: (T, 3, h, w) -> (T, 3, H, W), uint8 but with `resizing="tensor"`."""
        if self.augmentation.policy is not None:
            clip = self._by_policy(clip, int(mix(*seeds, 1)[0] >> 32))
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
        """(..., T, 3, H, W) in 0 to 255 -> float32 (..., 3, T, H, W), `(pixel / 255 - mean) / std`."""
        return clips.float().sub_(self.mean).div_(self.std).transpose(-4, -3)

    def _by_policy(self, clip: torch.Tensor, seed: int) -> torch.Tensor:
        """timm's RandAugment, drawn once for all frames of uint8 (T, 3, h, w)."""
        operations = rand_augment_of(self.augmentation.policy, min(clip.shape[-2:]), self.interpolation.value)
        frames = []
        for frame in clip:
            with seeded(seed):  # timm draws anew for each image
                frames.append(F.pil_to_tensor(operations(F.to_pil_image(frame))))
        return torch.stack(frames)

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
        by_tensor = self.resizing == "tensor"
        if by_tensor:
            steps.append(v2.ToDtype(torch.float32))
        if chosen.crop == "centre":
            steps.extend([_Cover(self.size, self.interpolation)] if by_tensor else [])
            steps.append(v2.CenterCrop(self.size))
        elif chosen.crop == "jitter" and by_tensor:
            steps.extend([_JitteredCover(self.size, chosen.jitter, self.interpolation), v2.RandomCrop(self.size)])
        elif chosen.crop == "jitter":
            steps.append(_JitteredCrop(self.size, chosen.jitter, self.interpolation))
        else:
            cut = v2.RandomResizedCrop(
                self.size, chosen.area, interpolation=self.interpolation, antialias=not by_tensor
            )
            steps.append(cut)
        if chosen.flip:
            steps.append(v2.RandomHorizontalFlip())
        if chosen.erasing:
            steps.append(v2.RandomErasing(chosen.erasing, value=self.colour))
        return v2.Compose(steps)


def cover(clip: torch.Tensor, size: list[int], interpolation: InterpolationMode) -> torch.Tensor:
    """Frames (..., 3, h, w) resized without antialiasing until they cover a size, float32."""
    height, width = covering(*clip.shape[-2:], *size)
    frames = clip.reshape(-1, *clip.shape[-3:]).float()
    if [height, width] == list(clip.shape[-2:]):
        return clip.float()
    corners = {} if interpolation == InterpolationMode.NEAREST else {"align_corners": False}
    resized = torch.nn.functional.interpolate(frames, (height, width), mode=interpolation.value, **corners)
    return resized.reshape(*clip.shape[:-2], height, width)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the context, Python's and NumPy's generators begin at a seed; after it they go on as if nothing was."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002  (timm draws from these)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


class _Cover(torch.nn.Module):
    """`cover` as a step."""

    def __init__(self, size: list[int], interpolation: InterpolationMode):
        super().__init__()
        self.size = size
        self.interpolation = interpolation

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        return cover(clip, self.size, self.interpolation)


class _JitteredCover(_Cover):
    """`cover` of 1 to `largest` times the size, a whole number of pixels of the height drawn uniformly."""

    def __init__(self, size: list[int], largest: float, interpolation: InterpolationMode):
        super().__init__(size, interpolation)
        self.largest = largest

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        height, width = self.size
        drawn = round(float(torch.empty(()).uniform_(height, round(height * self.largest))))
        return cover(clip, [drawn, round(width * drawn / height)], self.interpolation)


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
