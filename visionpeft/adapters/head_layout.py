"""Classification heads as plain data, so that a saved one can be rebuilt without pickle."""

from typing import get_type_hints

import timm.layers
import torch.nn as nn

from visionpeft import heads
from visionpeft.backbones.reach import without_storage
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
    nn.Flatten: ("start_dim", "end_dim"),
    nn.ReLU: (),  # in place or not: a rebuilt one is not
    nn.GELU: ("approximate",),
    nn.SiLU: (),
    nn.Tanh: (),
}
SAME = {timm.layers.Linear: nn.Linear}  # computes the same outside of TorchScript, with a forward of its own
WORDS = {"approximate": ("none", "tanh")}  # arguments that are words


def head_layout(head: nn.Module) -> dict:
    """What a head is built from again.

    Class and constructor arguments of one of `LAYERS`, of an `nn.Sequential` of them, or of a `DenseHead`; of another
    head of timm's, its class and its number of classes, of which timm's `reset_classifier` makes it.

    Raises:
        StorageError: for any other class.
    """
    kind = SAME.get(type(head), type(head))
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
    linear = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
    if kind.__module__.startswith("timm.") and linear:
        return {"class": kind.__name__, "num_classes": linear[-1].out_features}
    allowed = ", ".join(cls.__name__ for cls in LAYERS)
    raise StorageError(
        f"a head of class {type(head).__name__} cannot be saved; use Sequential, {allowed}, or keep the whole model "
        "with torch.save(model.state_dict(), file)"
    )


def head_from_layout(layout: dict, model: nn.Module, path: str) -> nn.Module:
    """Build the head that `head_layout` described.

    Args:
        layout: the description.
        model: the backbone, which can make a head of timm's.
        path: where in it the head is.

    Raises:
        StorageError: if the layout is not one that `head_layout` writes, or the model makes another head.
    """
    try:
        if "fields" in layout:
            return dense_head_from_layout(layout).make(**layout["arguments"])
        if "num_classes" in layout:
            return _head_of_the_library(layout, model, path)
        if layout["class"] == "Sequential":
            head = nn.Sequential()
            for name, layer in layout["layers"].items():
                head.add_module(name, head_from_layout(layer, model, path))
            return head
        (cls,) = [cls for cls in LAYERS if cls.__name__ == layout["class"]]
        head = cls(**layout["arguments"])
        # Constructors take words for numbers and anything for a flag.
        for name, value in layout["arguments"].items():
            if isinstance(value, str) and value not in WORDS.get(name, ()):
                raise ValueError
        return head
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, UserError):
        raise StorageError(f"the saved head {layout!r} is not one this version can build") from None


def check_reads(head: nn.Module, model: nn.Module) -> None:
    """Refuse a built head for dense prediction that reads other maps than those that a model gives its head.

    Raises:
        StorageError: it does.
    """
    if isinstance(head, DenseModule) and hasattr(model, "check_head"):
        model.check_head(dense_head_from_layout(head.layout), head)


def _head_of_the_library(layout: dict, model: nn.Module, path: str) -> nn.Module:
    """A head like that of the model, or the one that timm gives it for so many classes; without values."""
    skeleton = without_storage(model)
    if _layout_at(skeleton, path) != layout:
        skeleton.reset_classifier(layout["num_classes"])
        if _layout_at(skeleton, path) != layout:
            raise ValueError
    return skeleton.get_submodule(path).to_empty(device="cpu").requires_grad_(True)


def _layout_at(model: nn.Module, path: str) -> dict | None:
    try:
        return head_layout(model.get_submodule(path))
    except StorageError:  # a head of somebody's own
        return None


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
