"""What blocks share that pool their queries, as the first of a stage does in Hiera and in SAM 2's trunk: fewer and
wider tokens leave such a block than enter it.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn as nn

from visionpeft.backbones.attention import attend, qkv_layers
from visionpeft.backbones.dispatch import norm_layers, pre_norm_block
from visionpeft.backbones.layer import Layer
from visionpeft.backbones.timm_vit import backbone_with_fc
from visionpeft.backbones.tower import Backbone, BlockSites, Tower


def attend_pooled(attention: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v of heads (batch, heads, tokens, d), of an attention without dropout."""
    if attention.fused_attn:
        return attend(q, k, v)
    return ((q * attention.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def pooling_layers(attention: nn.Module) -> dict[str, Layer]:
    """Layer sites of an attention with `qkv`, from one width to another, and `proj`."""
    layers = qkv_layers(attention.qkv)
    layers["k"].shift_is_void = True
    return layers | {"proj": Layer("proj", "linear", attention.proj)}


def pooling_block(block: nn.Module, sited_class: type[nn.Module], probe: Callable[[int], dict]) -> BlockSites:
    """Describe a block from tokens of width `dim` to tokens of width `dim_out`.

    What stands for the stream where the width changes is made by a linear layer of the norm, at the site expand.
    """
    described = pre_norm_block(block, sited_class, probe)
    expand = getattr(block, "proj", None)
    if isinstance(expand, nn.Linear):
        described.layers["expand"] = Layer("expand", "linear", expand)
    described.width, described.on_map = block.dim_out, True
    described.entering_width = None if block.dim == block.dim_out else block.dim
    return described


def hiera_backbone(model: nn.Module, blocks: list[BlockSites]) -> Backbone:
    """Describe a timm model with `blocks`, `stage_ends` and a head with a norm and `fc`."""
    projection, starts = model.patch_embed.proj, [0, *(end + 1 for end in model.stage_ends)]
    tower = Tower(
        name="visual",
        path="",
        module=model,
        blocks=blocks,
        common_width=None,
        num_prefix_tokens=0,
        layers={"patch_embed": Layer("patch_embed", "conv", projection)} | norm_layers(norm=model.head.norm),
        patch_size=tuple(projection.stride),
        spanning=(model,),
        excluded=("head.fc.",),
        stages=tuple(after - before for before, after in pairwise(starts)),
    )
    return backbone_with_fc(model, tower)
