"""timm `SwinTransformer`: attention inside windows of a map, every second block shifted."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention

from visionpeft.backbones.attention import AttendsAfterNorm, open_in_front, qkv_layers
from visionpeft.backbones.dispatch import (
    describe_attention,
    describe_block,
    describe_model,
    norm_layers,
    pre_norm_block,
)
from visionpeft.backbones.layer import Layer
from visionpeft.backbones.timm_vit import backbone_with_fc, patch_embed_layers
from visionpeft.backbones.tower import BETWEEN, Backbone, BlockSites, Tower
from visionpeft.backbones.windows import SmallMap, add_positions, attend_in_windows, project_windows, window_heads
from visionpeft.sites import MapFlow, Sites


class SitedWindowAttention(WindowAttention):
    """timm Swin's `WindowAttention` with sites q, k, v and kv. Prompts and prefixes are keys in every window, with a
    relative position bias of zero and no mask.
    """

    sites: Sites

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, samples: int | None = None) -> torch.Tensor:
        """Attend inside windows (batch * windows, area, width), those of a sample one after another.

        Args:
            x: the windows.
            mask: (windows, area, area), added to the scores.
            samples: the batch; by default each window is a sample of its own.
        """
        samples, area = samples or len(x), x.shape[1]
        q, k, v = window_heads(self, x, self.sites, samples, self.qkv, self.qkv.bias)
        k, v = self.sites.kv(k, v, x)
        if self.fused_attn:
            bias = self._get_rel_pos_bias()
            if mask is not None:
                mask = mask[None, :, None].expand(len(x) // len(mask), -1, self.num_heads, -1, -1)
                bias = bias + mask.reshape(-1, self.num_heads, area, area)
            bias, _ = open_in_front(bias, False, area, k.shape[2], q)
            dropout = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            x = self.attn_drop(self.softmax(add_positions(scores, self._get_rel_pos_bias(), mask))) @ v
        return self.proj_drop(project_windows(self, x, self.sites, samples))


class SitedSwinTransformerBlock(SwinTransformerBlock, AttendsAfterNorm):
    """timm `SwinTransformerBlock` with sites: x + drop_path(windows(norm1 x)), then x + drop_path(mlp(norm2 x)).

    The pixels of the maps (batch, rows, columns, width) are the tokens; q, k, v, kv and proj are inside the windows,
    where the zeros by which a map is filled up take part.
    """

    sites: Sites

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map a map (batch, rows, columns, width) to the same shape."""
        shape = x.shape
        at = MapFlow(self.sites, shape[1:3])
        x = at("stream_in", x)
        h = at("attn_out", attend_in_windows(self, at("attn_in", self.norm1(x))))
        x = at("stream_mid", x + self.drop_path1(h)).reshape(shape[0], -1, shape[-1])
        h = at("mlp_out", self.sites.mlp(lambda x: self.mlp(at("mlp_in", self.norm2(x))), x))
        return at("stream_out", x + self.drop_path2(h)).reshape(shape)


@describe_attention.register
def _(attention: WindowAttention) -> tuple[type[nn.Module], dict[str, Layer]]:
    layers = qkv_layers(attention.qkv)
    layers["k"].shift_is_void = True
    return SitedWindowAttention, layers | {"proj": Layer("proj", "linear", attention.proj)}


@describe_block.register
def _(block: SwinTransformerBlock) -> BlockSites:
    return window_block(block, SitedSwinTransformerBlock)


def window_block(block: nn.Module, sited_class: type[nn.Module]) -> BlockSites:
    """Describe a block with attention inside windows."""
    width = block.attn.proj.out_features
    described = pre_norm_block(block, sited_class, SmallMap(block, width))
    described.width, described.on_map, described.knows_positions = width, True, True
    described.grid = None if block.dynamic_mask else tuple(block.input_resolution)
    sides = zip(block.input_resolution, block.window_size, strict=True)
    described.fills_up = block.dynamic_mask or any(side % window for side, window in sides)
    return described


@describe_model.register
def _(model: SwinTransformer) -> Backbone:
    return swin_backbone(model)


def swin_backbone(model: nn.Module) -> Backbone:
    """Describe a timm model with `layers`, which are stages of blocks after a `downsample`, and a head `head.fc`."""
    layers = patch_embed_layers(model) | norm_layers(patch_embed_norm=model.patch_embed.norm)
    for index, stage in enumerate(model.layers):
        if not isinstance(stage.downsample, nn.Identity):
            site = f"{BETWEEN}{index}/reduction"
            layers |= norm_layers(**{f"{BETWEEN}{index}/norm": stage.downsample.norm})
            layers[site] = Layer(site, "linear", stage.downsample.reduction, target="reduction")
    tower = Tower(
        name="visual",
        path="",
        module=model,
        blocks=[describe_block(block) for stage in model.layers for block in stage.blocks],
        common_width=None,
        num_prefix_tokens=0,
        layers=layers | norm_layers(norm=model.norm),
        patch_size=tuple(model.patch_embed.patch_size),
        spanning=(model,),
        excluded=("head.fc.",),
        grid_size=None if model.dynamic_img_size else tuple(model.patch_embed.grid_size),
        stages=tuple(len(stage.blocks) for stage in model.layers),
    )
    return backbone_with_fc(model, tower)
