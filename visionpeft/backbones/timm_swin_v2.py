"""timm `SwinTransformerV2`: Swin with cosine attention, a network that makes the position bias, and norms after the
branches.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block, WindowAttention

from visionpeft.backbones.attention import AttendsToStream, fused_qkv_layers, with_bias
from visionpeft.backbones.dispatch import describe_attention, describe_block, describe_model
from visionpeft.backbones.layer import Layer
from visionpeft.backbones.timm_swin import swin_backbone, window_block
from visionpeft.backbones.tower import Backbone, BlockSites
from visionpeft.backbones.windows import add_positions, attend_in_windows, project_windows, window_heads
from visionpeft.sites import MapFlow, Sites

LARGEST_SCALE = math.log(1.0 / 0.01)


class SitedWindowAttentionV2(WindowAttention):
    """timm SwinV2's `WindowAttention` with sites q, k, v and kv: softmax(s cos(q, k) + bias) v.

    Its weight of q, k and v is read and not called. At `kv` keys are normalised already; those of prompts and prefixes
    get a relative position bias of zero and no mask.
    """

    sites: Sites

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, samples: int | None = None) -> torch.Tensor:
        """Attend inside windows; see `SitedWindowAttention`."""
        samples = samples or len(x)
        bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        q, k, v = window_heads(self, x, self.sites, samples, with_bias(self, bias), bias)
        k, v = self.sites.kv(F.normalize(k, dim=-1), v, x)
        scores = F.normalize(q, dim=-1) @ k.transpose(-2, -1)
        scores = scores * torch.clamp(self.logit_scale, max=LARGEST_SCALE).exp()
        scores = add_positions(scores, self.position_bias(), mask)
        return self.proj_drop(project_windows(self, self.attn_drop(self.softmax(scores)) @ v, self.sites, samples))

    def position_bias(self) -> torch.Tensor:
        """Bias of relative positions (1, heads, area, area), from 0 to 16."""
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        area = self.window_size[0] * self.window_size[1]
        bias = table[self.relative_position_index.view(-1)].view(area, area, -1).permute(2, 0, 1).contiguous()
        return (16 * torch.sigmoid(bias)).unsqueeze(0)


class SitedSwinTransformerV2Block(SwinTransformerV2Block, AttendsToStream):
    """timm `SwinTransformerV2Block` with sites: x + drop_path(norm1(windows x)), then x + drop_path(norm2(mlp x)).

    The norms follow attention and MLP, so attn_in and mlp_in see the stream. The pixels of the maps (batch, rows,
    columns, width) are the tokens.
    """

    sites: Sites

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map a map (batch, rows, columns, width) to the same shape."""
        shape = x.shape
        at = MapFlow(self.sites, shape[1:3])
        x = at("stream_in", x)
        h = self.norm1(at("attn_out", attend_in_windows(self, at("attn_in", x))))
        x = at("stream_mid", x + self.drop_path1(h)).reshape(shape[0], -1, shape[-1])
        h = self.norm2(at("mlp_out", self.sites.mlp(lambda x: self.mlp(at("mlp_in", x)), x)))
        return at("stream_out", x + self.drop_path2(h)).reshape(shape)


@describe_attention.register
def _(attention: WindowAttention) -> tuple[type[nn.Module], dict[str, Layer]]:
    # The key bias is a buffer of zeros: it is no parameter, and as keys are normalised a shift of them is not void.
    bias = {} if attention.q_bias is None else {site: (attention, f"{site}_bias", None) for site in ("q", "v")}
    layers = fused_qkv_layers(attention.qkv, "weight", bias)
    return SitedWindowAttentionV2, layers | {"proj": Layer("proj", "linear", attention.proj)}


@describe_block.register
def _(block: SwinTransformerV2Block) -> BlockSites:
    return window_block(block, SitedSwinTransformerV2Block)


@describe_model.register
def _(model: SwinTransformerV2) -> Backbone:
    return swin_backbone(model)
