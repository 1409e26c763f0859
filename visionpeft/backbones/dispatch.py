"""Where a block family is plugged in: one `singledispatch` function for each kind of module.

A family registers the classes it knows; code outside the package can register more. `visionpeft.backbones.describe`
is the way in.
"""

from collections.abc import Callable
from functools import singledispatch

import torch.nn as nn

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Backbone, BlockSites
from visionpeft.errors import UnsupportedError
from visionpeft.sites.stand_ins import class_below


@singledispatch
def describe_model(model: nn.Module) -> Backbone:
    """Describe a whole model; registered by model class."""
    if part := part_of(model, layers_too=True):
        raise UnsupportedError(f"{type(model).__name__} is no model that can be adapted as a whole{part}")
    raise UnsupportedError(
        f"{type(model).__name__} has no sited blocks; timm VisionTransformer (relative positions, too), Eva (EVA, "
        "EVA-02, DINOv3, RoPE ViTs), Beit, NaFlexVit, Qwen3-VL towers, Swin, SwinV2, ConvNeXt, Hiera and the encoders "
        "of SAM and SAM 2 have, and OpenCLIP models with such or native transformer towers; any other timm model has "
        "layer sites"
    )


def is_known(model: nn.Module) -> bool:
    """Whether a family has registered the model's class, or one that it comes from."""
    return describe_model.dispatch(type(model)) is not describe_model.dispatch(object)


def part_of(model: nn.Module, layers_too: bool = False) -> str:
    """The end of a sentence that refuses a model: which part of it has blocks, or is one of timm's models at all."""
    for path, part in model.named_modules():
        if path and (is_known(part) or (layers_too and hasattr(part, "pretrained_cfg"))):
            return f"; its part {path!r} is a {type(part).__name__}: attach to that"
    return ""


@singledispatch
def describe_block(block: nn.Module) -> BlockSites:
    """Describe one transformer block; registered by block class."""
    raise UnsupportedError(f"blocks of class {type(block).__name__} have no sited form")


@singledispatch
def describe_attention(attention: nn.Module) -> tuple[type[nn.Module], dict[str, Layer]]:
    """Sited class and layer sites of an attention module; registered by attention class."""
    raise UnsupportedError(f"attention of class {type(attention).__name__} has no sited form")


@singledispatch
def describe_mlp(mlp: nn.Module) -> dict[str, Layer]:
    """Layer sites of an MLP; registered by MLP class."""
    raise UnsupportedError(f"an MLP of class {type(mlp).__name__} has no described layers")


def architecture(model: nn.Module) -> str:
    """Architecture name and pretrained tag as timm records them."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name, tag = config.get("architecture") or type(model).__name__, config.get("tag")
    return f"{name}.{tag}" if tag else name


def norm_layers(**norms: nn.Module | None) -> dict[str, Layer]:
    """Layer sites for those normalisations that have a weight."""
    return {
        site: Layer(site, "norm", norm) for site, norm in norms.items() if getattr(norm, "weight", None) is not None
    }


def require_own_class(module: nn.Module, sited_class: type[nn.Module]) -> None:
    """Refuse a module of a subclass of the class whose forward a sited class writes out.

    Raises:
        UnsupportedError: naming it.
    """
    if not issubclass(sited_class, class_below(module)):
        raise UnsupportedError(
            f"{type(module).__name__} is a subclass of {sited_class.__mro__[1].__name__} with its own code; "
            "register a sited form of it with visionpeft.backbones.dispatch"
        )


def pre_norm_block(
    block: nn.Module, sited_class: type[nn.Module], probe: Callable[[int], dict] = lambda num_tokens: {}
) -> BlockSites:
    """Describe a block with timm's attribute names: norm1, attn, norm2, mlp."""
    sited_attention_class, layers = describe_attention(block.attn)
    require_own_class(block, sited_class)
    require_own_class(block.attn, sited_attention_class)
    layers = norm_layers(norm1=block.norm1) | layers | norm_layers(norm2=block.norm2) | describe_mlp(block.mlp)
    activation = getattr(block.mlp, "act", None)
    return BlockSites(block, sited_class, block.attn, sited_attention_class, layers, probe, activation)
