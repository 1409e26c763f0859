"""Classification heads as plain data, so that a saved one can be rebuilt without pickle."""

from typing import get_type_hints

import torch.nn as nn

from visionpeft import heads
from visionpeft.errors import StorageError, UserError
from visionpeft.extensions import classes_by_name
from visionpeft.heads import DenseHead
from visionpeft.heads.base import DenseModule
from visionpeft.methods.parts.field_types import from_json
from visionpeft.methods.parts.several_features import SeveralFeatures

# layer class -> attributes that its constructor takes
LAYERS = {
    SeveralFeatures: ("in_features", "out_features"),
    nn.Identity: (),
    nn.Dropout: ("p",),
    nn.Linear: ("in_features", "out_features"),
    nn.Conv2d: ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.BatchNorm1d: ("num_features", "eps", "momentum", "affine", "track_running_stats"),
}


def head_layout(head: nn.Module) -> dict:
    """Class and constructor arguments of a head: one of `LAYERS`, an `nn.Sequential` of them, or a `DenseHead`'s.

    Raises:
        StorageError: for any other class.
    """
    kind = type(head)
    if isinstance(head, DenseModule):
        return dict(head.layout)
    if kind is nn.Sequential:
        return {"class": "Sequential", "layers": {name: head_layout(layer) for name, layer in head.named_children()}}
    for cls, names in LAYERS.items():
        if kind is cls or (issubclass(kind, cls) and kind.forward is cls.forward):
            arguments = {name: getattr(head, name) for name in names}
            if issubclass(cls, nn.Linear | nn.Conv2d):
                arguments["bias"] = head.bias is not None
            return {"class": cls.__name__, "arguments": arguments}
    allowed = ", ".join(cls.__name__ for cls in LAYERS)
    raise StorageError(f"a head of class {type(head).__name__} cannot be saved; use Sequential, {allowed}")


def head_from_layout(layout: dict) -> nn.Module:
    """Build the head that `head_layout` described.

    Raises:
        StorageError: if the layout is not one that `head_layout` writes.
    """
    try:
        if "fields" in layout:
            return dense_head_from_layout(layout).make(**layout["arguments"])
        if layout["class"] == "Sequential":
            head = nn.Sequential()
            for name, layer in layout["layers"].items():
                head.add_module(name, head_from_layout(layer))
            return head
        (cls,) = [cls for cls in LAYERS if cls.__name__ == layout["class"]]
        head = cls(**layout["arguments"])
        # Constructors take words for numbers and anything for a flag.
        if any(isinstance(value, str) for value in layout["arguments"].values()):
            raise ValueError
        return head
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, UserError):
        raise StorageError(f"the saved head {layout!r} is not one this version can build") from None


def dense_head_from_layout(layout: dict) -> DenseHead:
    """The description of a head for dense prediction that `head_layout` wrote down.

    Raises:
        StorageError: if this version has no such head, or it has other fields.
    """
    own = [getattr(heads, name) for name in heads.__all__ if name not in ("DenseHead", "DetectionHead")]
    try:
        kind = classes_by_name(DenseHead, own)[layout["class"]]
        types = get_type_hints(kind)
        return kind(**{name: from_json(value, types.get(name)) for name, value in layout["fields"].items()})
    except (KeyError, TypeError, AttributeError, UserError):
        raise StorageError(f"the saved head {layout!r} is not one this version can build") from None
