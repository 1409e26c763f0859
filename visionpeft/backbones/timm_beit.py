"""timm `Beit`: BEiT and BEiTv2, with relative position bias and query and value biases outside the fused projection."""

import torch
import torch.nn as nn
from timm.models.beit import Attention, Beit, Block

from visionpeft.backbones.attention import (
    AttendsAfterNorm,
    attend_as,
    fused_qkv,
    fused_qkv_layers,
    with_bias,
)
from visionpeft.backbones.dispatch import describe_attention, describe_block, describe_model, pre_norm_block
from visionpeft.backbones.layer import Layer
from visionpeft.backbones.timm_vit import timm_backbone
from visionpeft.backbones.tower import Backbone, BlockSites
from visionpeft.sites import UNTOUCHED, Sites
from visionpeft.sites.asking import ONLY_KEYS


class SitedBeitAttention(Attention):
    """timm BEiT attention with sites q, k, v and kv. Prompts and prefixes get a relative position bias of zero."""

    sites: Sites

    def forward(self, x: torch.Tensor, shared_rel_pos_bias: torch.Tensor | None = None) -> torch.Tensor:
        """Attend over tokens (batch, tokens, width)."""
        return self._attention(x, self.sites, self.sites.mask(self.position_bias(shared_rel_pos_bias)))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over tokens (batch, tokens, width) without positions and without what acts at the sites."""
        return self._attention(x, UNTOUCHED, None)

    def _attention(self, x: torch.Tensor, sites: Sites, position_bias: torch.Tensor | None) -> torch.Tensor:
        q, k, v = self._heads(x, sites)
        k, v = sites.kv(k, v, x, lambda h: self._heads(h, ONLY_KEYS)[1:])
        x = attend_as(self, q, k, v, attn_mask=position_bias, fused=self.fused_attn)
        return self.proj_drop(sites.call(self.proj, x.transpose(1, 2).flatten(2)))

    def _heads(self, x: torch.Tensor, sites: Sites) -> tuple[torch.Tensor, ...]:
        """q, k, v (batch, heads, tokens, head width) of tokens x (batch, tokens, width)."""
        bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        parts = fused_qkv(sites, x, with_bias(self, bias), self.qkv.weight, bias)
        return tuple(part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)

    def position_bias(self, shared: torch.Tensor | None) -> torch.Tensor | None:
        """Relative position bias (1, heads, N, N), own and shared added, or None."""
        if self.relative_position_bias_table is None:
            return shared
        own = self._get_rel_pos_bias()
        return own if shared is None else own + shared


class SitedBeitBlock(Block, AttendsAfterNorm):
    """timm BEiT `Block` with sites: like the ViT block, with the layer scales gamma_1 and gamma_2."""

    sites: Sites

    def forward(self, x: torch.Tensor, shared_rel_pos_bias: torch.Tensor | None = None) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        at = self.sites.enter()
        x = at("stream_in", x)
        h = at("attn_in", self.norm1(x))
        h = at("attn_out", self.attn(h, shared_rel_pos_bias=shared_rel_pos_bias))
        x = at("stream_mid", self.sites.followed(x) + self.drop_path1(h if self.gamma_1 is None else self.gamma_1 * h))
        h = at("mlp_out", self.sites.mlp(lambda x: self.mlp(at("mlp_in", self.norm2(x))), x))
        return at("stream_out", x + self.drop_path2(h if self.gamma_2 is None else self.gamma_2 * h))


@describe_attention.register
def _(attention: Attention) -> tuple[type[nn.Module], dict[str, Layer]]:
    bias = {} if attention.q_bias is None else {s: (attention, f"{s}_bias", None) for s in ("q", "v")}
    layers = fused_qkv_layers(attention.qkv, "weight", bias)
    layers["k"].shift_is_void = True
    return SitedBeitAttention, layers | {"proj": Layer("proj", "linear", attention.proj)}


@describe_block.register
def _(block: Block) -> BlockSites:
    attention = block.attn

    def probe(num_tokens: int) -> dict:
        if attention.window_size is not None:
            return {"num_tokens": attention.window_size[0] * attention.window_size[1] + 1}
        return {"shared_rel_pos_bias": torch.randn(1, attention.num_heads, num_tokens, num_tokens).double()}

    described = pre_norm_block(block, SitedBeitBlock, probe)
    described.knows_positions = True
    return described


@describe_model.register
def _(model: Beit) -> Backbone:
    return timm_backbone(model)
