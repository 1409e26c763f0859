"""How a backbone wants its images: size, normalisation and interpolation, read from its pretrained configuration."""

from dataclasses import dataclass
from typing import Literal

import timm.data
from torch import nn

from visionpeft.errors import UnsupportedError

Resize = Literal["squash", "crop"]  # how an image of any shape becomes one of the input size


@dataclass(frozen=True)
class Preprocessing:
    """What a backbone was pretrained with.

    Args:
        input_size: height and width of the input image.
        mean: per-channel mean that is subtracted, for pixels in [0, 1].
        std: per-channel standard deviation that divides.
        interpolation: how images are resized: "bicubic", "bilinear" or "nearest".
        crop_pct: share of the resized image that the evaluation crop keeps.
    """

    input_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """Read the preprocessing of a timm model, an OpenCLIP model or the image tower of one.

    Raises:
        UnsupportedError: the model carries neither a timm `pretrained_cfg` nor an OpenCLIP preprocessing.
    """
    tower = getattr(model, "visual", model)
    if hasattr(tower, "preprocess_cfg"):
        return _of_open_clip(tower)
    if getattr(model, "pretrained_cfg", None):
        return _of_timm(model)
    raise UnsupportedError(
        f"{type(model).__name__} does not say how its images are normalised; build it with visionpeft.create_backbone, "
        "timm.create_model or open_clip.create_model, or pass a Preprocessing yourself"
    )


def _of_open_clip(tower: nn.Module) -> Preprocessing:
    size, mean, std = (tower.preprocess_cfg[key] for key in ("size", "mean", "std"))
    size = (size, size) if isinstance(size, int) else tuple(size)
    return Preprocessing(size, tuple(mean), tuple(std), tower.preprocess_cfg["interpolation"], crop_pct=1.0)


def _of_timm(model: nn.Module) -> Preprocessing:
    config = timm.data.resolve_model_data_config(model)
    size = tuple(config["input_size"][-2:])
    # A model built with `img_size=` keeps the size of its weights in the configuration.
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if built_for is not None:
        size = tuple(built_for)
    return Preprocessing(
        size, tuple(config["mean"]), tuple(config["std"]), config["interpolation"], float(config["crop_pct"])
    )
