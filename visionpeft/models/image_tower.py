"""What a model whose head reads every patch does with the backbone in it: check it, fill up images, describe it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from visionpeft.backbones.dispatch import describe, describe_model
from visionpeft.backbones.tower import Backbone, Tower
from visionpeft.errors import ConfigurationError, UnsupportedError


def image_tower(backbone: nn.Module, reader: str) -> Tower:
    """The tower of a model of images alone, with sited blocks.

    Args:
        backbone: the model.
        reader: what is to read it, with its article, for errors.

    Raises:
        UnsupportedError: it is another model, or its blocks are not sited.
    """
    towers = describe(backbone).towers
    if "visual" not in towers or "text" in towers:
        raise UnsupportedError(
            f"{reader} takes a model of images alone, not a {type(backbone).__name__}; of a CLIP give its image tower, "
            ".visual"
        )
    if towers["visual"].layers_only is not None:
        raise UnsupportedError(f"{reader} needs sited blocks; {towers['visual'].layers_only}")
    if towers["visual"].common_width is not None and any(block.on_map for block in towers["visual"].blocks):
        kind = type(towers["visual"].module).__name__
        raise UnsupportedError(f"{reader} reads tokens in a line, but those of {kind} are the pixels of a map")
    return towers["visual"]


def filled_up(images: torch.Tensor, patch: Sequence[int], reader: str) -> torch.Tensor:
    """Images (batch, channels, height, width) with zeros on the right and at the bottom, up to whole patches.

    Raises:
        ConfigurationError: another number of dimensions.
    """
    if images.ndim != 4:
        raise ConfigurationError(
            f"{reader} takes images (batch, channels, height, width), not a tensor of shape {tuple(images.shape)}"
        )
    rows, columns = (-side % own for side, own in zip(images.shape[-2:], patch, strict=True))
    return F.pad(images, (0, columns, 0, rows)) if rows or columns else images


def describe_around(model: nn.Module) -> Backbone:
    """A model with a `backbone`, of which every patch is read, and a `head` of its own."""
    inside = describe_model(model.backbone)
    tower = inside.towers["visual"]
    tower.path = f"backbone.{tower.path}".rstrip(".")
    tower.pools_class_token = False
    unused = tuple(f"backbone.{path}" for path in inside.heads)
    return Backbone(inside.library, inside.name, model, {"visual": tower}, ("head",), unused_heads=unused)
