"""The way in: towers, blocks, layers and heads of a model that somebody brings."""

import importlib
import sys

from torch import nn

from visionpeft.backbones.layers_only import describe_part
from visionpeft.backbones.made_tensors import check_weights
from visionpeft.backbones.tower import Backbone
from visionpeft.errors import UnsupportedError


def describe(model: nn.Module) -> Backbone:
    """Towers, blocks, layers and heads of a model, as methods see them.

    Args:
        model: a timm or OpenCLIP model, or one of this package that holds one; with adapters or without.

    Raises:
        UnsupportedError: the model, or a block, attention or MLP in it, is of a class that no family knows; or the
            model is compiled or sharded.
    """
    if hasattr(model, "_orig_mod"):
        raise UnsupportedError(
            f"{type(model._orig_mod).__name__} is already compiled; attach before torch.compile (compile the result)"
        )
    if any(cls.__name__ == "FSDPModule" for cls in type(model).__mro__):
        raise UnsupportedError(f"{type(model).__name__} is already sharded; attach before fully_shard")
    check_weights(model)
    if "open_clip" in sys.modules:  # no model of OpenCLIP is there without it; importing it takes seconds
        importlib.import_module("visionpeft.backbones.open_clip")
    return describe_part(model)
