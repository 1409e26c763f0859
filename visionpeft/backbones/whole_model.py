"""The way in: towers, blocks, layers and heads of a model that somebody brings."""

import importlib
import sys

from torch import nn

from visionpeft.backbones.layers_only import describe_part
from visionpeft.backbones.made_tensors import check_weights
from visionpeft.backbones.tower import Backbone
from visionpeft.backbones.wrapped import check_not_wrapped


def describe(model: nn.Module) -> Backbone:
    """Towers, blocks, layers and heads of a model, as methods see them.

    Args:
        model: a timm or OpenCLIP model, or one of this package that holds one; with adapters or without.

    Raises:
        UnsupportedError: the model, or a block, attention or MLP in it, is of a class that no family knows; or the
            model is compiled, sharded, or inside something that has to be made after attaching.
    """
    check_not_wrapped(model)
    check_weights(model)
    if "open_clip" in sys.modules:  # no model of OpenCLIP is there without it; importing it takes seconds
        importlib.import_module("visionpeft.backbones.open_clip")
    return describe_part(model)
