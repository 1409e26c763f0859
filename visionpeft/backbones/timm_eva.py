"""timm `Eva`: EVA, EVA-02, DINOv3, Perception Encoder and ViT-RoPE, with rotary positions and fused or split qkv."""

import torch
import torch.fx
import torch.nn as nn
from timm.layers import apply_rot_embed_cat
from timm.layers.attention import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm

from visionpeft.backbones.attention import (
    AttendsAfterNorm,
    AttendsToStream,
    attend_as,
    fused_qkv,
    fused_qkv_layers,
    in_front,
    qkv_layers,
    with_bias,
)
from visionpeft.backbones.dispatch import describe_attention, describe_block, describe_model, pre_norm_block
from visionpeft.backbones.layer import Layer
from visionpeft.backbones.timm_layers import attention_output_layers
from visionpeft.backbones.timm_vit import timm_backbone
from visionpeft.backbones.tower import Backbone, BlockSites
from visionpeft.sites import UNSEEN, UNTOUCHED, Sites
from visionpeft.sites.asking import ONLY_KEYS


class SitedEvaAttention(EvaAttention):
    """timm `EvaAttention` (no key bias, bias outside the fused projection) with sites q, k, v and kv."""

    sites: Sites

    def forward(
        self,
        x: torch.Tensor,
        rope: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Attend over tokens (batch, tokens, width); `rope` rotates the patches, never prefix or prompt tokens."""
        return rotary_attention(self, x, self.sites, rope, attn_mask, is_causal)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over tokens (batch, tokens, width) without positions and without what acts at the sites."""
        return rotary_attention(self, x, UNTOUCHED)

    def project(self, x: torch.Tensor, sites: Sites) -> tuple[torch.Tensor, ...]:
        """q, k, v (batch, tokens, heads * head width) with what acts at these sites."""
        if self.qkv is None:
            return split_qkv(self, x, sites)
        bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        return fused_qkv(sites, x, with_bias(self, bias), self.qkv.weight, bias)


class SitedAttentionRope(AttentionRope):
    """timm `AttentionRope` (optionally fewer key and value heads) with sites q, k, v and kv."""

    sites: Sites

    def forward(
        self,
        x: torch.Tensor,
        rope: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Attend over tokens (batch, tokens, width); `rope` rotates the patches, never prefix or prompt tokens."""
        return rotary_attention(self, x, self.sites, rope, attn_mask, is_causal)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over tokens (batch, tokens, width) without positions and without what acts at the sites."""
        return rotary_attention(self, x, UNTOUCHED)

    def project(self, x: torch.Tensor, sites: Sites) -> tuple[torch.Tensor, ...]:
        """q, k, v (batch, tokens, heads * head width) with what acts at these sites."""
        if self.qkv is None:
            return split_qkv(self, x, sites)
        return fused_qkv(sites, x, self.qkv, self.qkv.weight, self.qkv.bias)


def split_qkv(attention: EvaAttention | AttentionRope, x: torch.Tensor, sites: Sites) -> tuple[torch.Tensor, ...]:
    """q (batch, tokens that ask, width) and k, v (batch, keys, width) of three separate layers, as `fused_qkv`."""
    prompts = sites.prompts(x)
    q, *kv = (
        sites.call(attention.q_proj, sites.followed(x)),
        sites.call(attention.k_proj, x),
        sites.call(attention.v_proj, x),
    )
    if prompts is not None:
        others = (UNSEEN.call(layer, prompts) for layer in (attention.k_proj, attention.v_proj))
        kv = [in_front(other, own) for other, own in zip(others, kv, strict=True)]
    return q, *kv


@torch.fx.wrap  # traced by torch.fx, the number of patches cannot be compared
def rotated(x: torch.Tensor, rope: torch.Tensor, patches: int, half: bool) -> torch.Tensor:
    """Rotate the last tokens of x (batch, heads, tokens, head width), as many as there are patches."""
    if patches == 0:
        return x
    return torch.cat((x[:, :, :-patches], apply_rot_embed_cat(x[:, :, -patches:], rope, half=half)), dim=2)


def rotary_heads(
    attention: EvaAttention | AttentionRope, x: torch.Tensor, sites: Sites, rope: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """q, k, v (batch, heads, tokens, head width) of tokens x (batch, tokens, width), with what acts at these sites."""
    qkv = attention.project(x, sites)
    heads = (attention.num_heads, *(kv_heads(attention),) * 2)
    q, k, v = (part.unflatten(-1, (h, -1)).transpose(1, 2) for part, h in zip(qkv, heads, strict=True))
    q, k = sites.call(attention.q_norm, q), sites.call(attention.k_norm, k)
    if rope is not None:
        patches = x.shape[1] - attention.num_prefix_tokens - sites.extra_tokens - sites.queries
        half = getattr(attention, "rotate_half", False)
        q = rotated(q, rope, patches if sites.kept is None else 0, half).type_as(v)
        k = rotated(k, rope, patches, half).type_as(v)
    return q, k, v


def kv_heads(attention: EvaAttention | AttentionRope) -> int:
    """Number of heads of keys and values."""
    return getattr(attention, "num_kv_heads", attention.num_heads)


def rotary_attention(
    attention: EvaAttention | AttentionRope,
    x: torch.Tensor,
    sites: Sites,
    rope: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """What EvaAttention and AttentionRope do with tokens (batch, tokens, width), and what acts at these sites."""
    gate = sites.call(attention.gate, sites.followed(x)).sigmoid() if attention.gate is not None else None
    q, k, v = rotary_heads(attention, x, sites, rope)
    k, v = sites.kv(k, v, x, lambda h: rotary_heads(attention, h, ONLY_KEYS, rope)[1:])
    groups = attention.num_heads // kv_heads(attention)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    x = attend_as(attention, q, k, v, attn_mask=attn_mask, is_causal=is_causal, fused=attention.fused_attn)
    x = sites.call(attention.norm, x.transpose(1, 2).flatten(2))
    if gate is not None:
        x = x * gate
    return attention.proj_drop(sites.call(attention.proj, x))


class SitedEvaBlock(EvaBlock, AttendsAfterNorm):
    """timm `EvaBlock` with sites: like the ViT block, with the layer scales gamma_1 and gamma_2."""

    sites: Sites

    def forward(
        self,
        x: torch.Tensor,
        rope: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        at = self.sites.enter()
        x = at("stream_in", x)
        mask = self.sites.mask(attn_mask, is_causal)
        h = self.attn(at("attn_in", self.norm1(x)), rope=rope, attn_mask=mask, is_causal=is_causal)
        h = at("attn_out", h)
        x = at("stream_mid", self.sites.followed(x) + self.drop_path1(h if self.gamma_1 is None else self.gamma_1 * h))
        h = at("mlp_out", self.sites.mlp(lambda x: self.mlp(at("mlp_in", self.norm2(x))), x))
        return at("stream_out", x + self.drop_path2(h if self.gamma_2 is None else self.gamma_2 * h))


class SitedEvaBlockPostNorm(EvaBlockPostNorm, AttendsToStream):
    """timm `EvaBlockPostNorm` with sites: the norms follow attention and MLP."""

    sites: Sites

    def forward(
        self,
        x: torch.Tensor,
        rope: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        at = self.sites.enter()
        x = at("stream_in", x)
        mask = self.sites.mask(attn_mask, is_causal)
        h = self.attn(at("attn_in", x), rope=rope, attn_mask=mask, is_causal=is_causal)
        x = at("stream_mid", self.sites.followed(x) + self.drop_path1(self.norm1(at("attn_out", h))))
        h = at("mlp_out", self.sites.mlp(lambda x: self.mlp(at("mlp_in", x)), x))
        return at("stream_out", x + self.drop_path2(self.norm2(h)))


@describe_attention.register
def _(attention: EvaAttention) -> tuple[type[nn.Module], dict[str, Layer]]:
    if attention.qkv is None:
        return SitedEvaAttention, split_qkv_layers(attention) | attention_output_layers(attention)
    bias = {} if attention.q_bias is None else {s: (attention, f"{s}_bias", None) for s in ("q", "v")}
    return SitedEvaAttention, fused_qkv_layers(attention.qkv, "weight", bias) | attention_output_layers(attention)


@describe_attention.register
def _(attention: AttentionRope) -> tuple[type[nn.Module], dict[str, Layer]]:
    if attention.qkv is None:
        return SitedAttentionRope, split_qkv_layers(attention) | attention_output_layers(attention)
    return SitedAttentionRope, qkv_layers(attention.qkv) | attention_output_layers(attention)


def split_qkv_layers(attention: nn.Module) -> dict[str, Layer]:
    """Layer sites of q_proj, k_proj and v_proj."""
    return {site: Layer(site, "linear", getattr(attention, f"{site}_proj")) for site in "qkv"}


@describe_block.register(EvaBlock)
@describe_block.register(EvaBlockPostNorm)
def _(block: EvaBlock | EvaBlockPostNorm) -> BlockSites:
    def probe(num_tokens: int) -> dict:
        patches = num_tokens - block.attn.num_prefix_tokens
        return {"rope": torch.randn(patches, 2 * block.attn.head_dim, dtype=torch.float64)}

    described = pre_norm_block(block, SitedEvaBlock if isinstance(block, EvaBlock) else SitedEvaBlockPostNorm, probe)
    described.knows_positions = True
    return described


@describe_model.register
def _(model: Eva) -> Backbone:
    return timm_backbone(model, norm_pre=model.norm_pre)
