"""timm `VisionTransformerRelPos`: ViTs with a relative position bias, from a table or made by an MLP, for each block or
shared by all.
"""

import torch
import torch.nn as nn
from timm.layers import RelPosMlp
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)

from visionpeft.backbones.attention import AttendsAfterNorm, AttendsToStream, attend_as, qkv_layers
from visionpeft.backbones.dispatch import (
    describe_attention,
    describe_block,
    describe_model,
    norm_layers,
    pre_norm_block,
)
from visionpeft.backbones.layer import Layer
from visionpeft.backbones.timm_layers import plain_heads
from visionpeft.backbones.timm_vit import timm_backbone
from visionpeft.backbones.tower import Backbone, BlockSites
from visionpeft.sites import UNTOUCHED, Sites
from visionpeft.sites.asking import ONLY_KEYS


class SitedRelPosAttention(RelPosAttention):
    """timm `RelPosAttention` with sites q, k, v and kv. Prompts and prefixes get a relative position bias of zero."""

    sites: Sites

    def forward(self, x: torch.Tensor, shared_rel_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Attend over tokens (batch, tokens, width)."""
        position_bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        return self._attention(x, self.sites, self.sites.mask(position_bias))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over tokens (batch, tokens, width) without positions and without what acts at the sites."""
        return self._attention(x, UNTOUCHED, None)

    def _attention(self, x: torch.Tensor, sites: Sites, position_bias: torch.Tensor | None) -> torch.Tensor:
        q, k, v = plain_heads(self, x, sites)
        k, v = sites.kv(k, v, x, lambda h: plain_heads(self, h, ONLY_KEYS)[1:])
        x = attend_as(self, q, k, v, attn_mask=position_bias, fused=self.fused_attn)
        return self.proj_drop(sites.call(self.proj, x.transpose(1, 2).flatten(2)))


class SitedRelPosBlock(RelPosBlock, AttendsAfterNorm):
    """timm `RelPosBlock` with sites: like the ViT block."""

    sites: Sites

    def forward(self, x: torch.Tensor, shared_rel_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        at = self.sites.enter()
        x = at("stream_in", x)
        h = self.ls1(at("attn_out", self.attn(at("attn_in", self.norm1(x)), shared_rel_pos=shared_rel_pos)))
        x = at("stream_mid", self.sites.followed(x) + self.drop_path1(h))
        h = at("mlp_out", self.sites.mlp(lambda x: self.mlp(at("mlp_in", self.norm2(x))), x))
        return at("stream_out", x + self.drop_path2(self.ls2(h)))


class SitedResPostRelPosBlock(ResPostRelPosBlock, AttendsToStream):
    """timm `ResPostRelPosBlock` with sites: the norms follow the branches, so attn_in and mlp_in see the stream."""

    sites: Sites

    def forward(self, x: torch.Tensor, shared_rel_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        at = self.sites.enter()
        x = at("stream_in", x)
        h = self.norm1(at("attn_out", self.attn(at("attn_in", x), shared_rel_pos=shared_rel_pos)))
        x = at("stream_mid", self.sites.followed(x) + self.drop_path1(h))
        h = self.norm2(at("mlp_out", self.sites.mlp(lambda x: self.mlp(at("mlp_in", x)), x)))
        return at("stream_out", x + self.drop_path2(h))


@describe_attention.register
def _(attention: RelPosAttention) -> tuple[type[nn.Module], dict[str, Layer]]:
    layers = qkv_layers(attention.qkv)
    layers["k"].shift_is_void = isinstance(attention.k_norm, nn.Identity)
    layers |= norm_layers(q_norm=attention.q_norm, k_norm=attention.k_norm)
    return SitedRelPosAttention, layers | {"proj": Layer("proj", "linear", attention.proj)}


@describe_block.register(RelPosBlock)
@describe_block.register(ResPostRelPosBlock)
def _(block: RelPosBlock | ResPostRelPosBlock) -> BlockSites:
    attention = block.attn

    def probe(num_tokens: int) -> dict:
        if attention.rel_pos is not None:
            return {"num_tokens": attention.rel_pos.window_area + attention.rel_pos.prefix_tokens}
        return {"shared_rel_pos": torch.randn(1, attention.num_heads, num_tokens, num_tokens).double()}

    sited_class = SitedRelPosBlock if isinstance(block, RelPosBlock) else SitedResPostRelPosBlock
    described = pre_norm_block(block, sited_class, probe)
    described.knows_positions = True
    return described


@describe_model.register
def _(model: VisionTransformerRelPos) -> Backbone:
    backbone = timm_backbone(model)
    tower, last = backbone.towers["visual"], f"blocks.{len(model.blocks) - 1}.attn.rel_pos."
    if tower.pools_class_token and isinstance(model.blocks[-1].attn.rel_pos, RelPosMlp):
        # Such a bias is zero for the class token, which alone is read after the last block.
        tower.unreached = frozenset(name for name, _ in model.named_parameters() if name.startswith(last))
    return backbone
