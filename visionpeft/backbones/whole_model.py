"""The way in: towers, blocks, layers and heads of a model that somebody brings."""

import importlib
import sys

from torch import nn

from visionpeft.backbones.layers_only import describe_part
from visionpeft.backbones.made_tensors import check_weights
from visionpeft.backbones.tower import Backbone
from visionpeft.errors import UnsupportedError


def describe(model: nn.Module) -> Backbone:
    """Towers, blocks, layers and heads of a model.

    Raises:
        UnsupportedError: if the model, or a block, attention or MLP in it, is of a class no family knows.
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
