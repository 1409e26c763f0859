"""Differential attention, the difference of two softmaxes: timm's `DiffAttention`, and what its parallel block shares.

(softmax(q1 k1^T / sqrt(d)) - lambda softmax(q2 k2^T / sqrt(d))) v for each head, whose queries and keys are two halves
of width d and whose values are 2 d wide. At `kv` a head's keys are both halves side by side, as wide as its values.
Ye et al., Differential Transformer, 2024, https://arxiv.org/abs/2410.05258.
"""

import torch
import torch.nn as nn
from timm.layers.diff_attention import DiffAttention

from visionpeft.backbones.attention import attend, attention_weights, fused_qkv, qkv_layers
from visionpeft.backbones.dispatch import describe_attention, norm_layers
from visionpeft.backbones.layer import Layer
from visionpeft.backbones.timm_layers import attention_output_layers
from visionpeft.sites import UNTOUCHED, Sites
from visionpeft.sites.asking import ONLY_KEYS


class SitedDiffAttention(DiffAttention):
    """timm `DiffAttention` with sites q, k, v and kv."""

    sites: Sites

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """Attend over tokens (batch, tokens, width)."""
        return self._attention(x, self.sites, attn_mask, is_causal)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over tokens (batch, tokens, width) as the backbone does, without what acts at the sites."""
        return self._attention(x, UNTOUCHED)

    def _attention(
        self, x: torch.Tensor, sites: Sites, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        q, k, v = self._heads(x, sites)
        k, v = sites.kv(k, v, x, lambda h: self._heads(h, ONLY_KEYS)[1:])
        x = attend_twice(self, q, k, v, sites, attn_mask, is_causal)
        return self.proj_drop(sites.call(self.proj, sites.call(self.norm, x)))

    def _heads(self, x: torch.Tensor, sites: Sites) -> tuple[torch.Tensor, ...]:
        return paired_heads(self, fused_qkv(sites, x, self.qkv, self.qkv.weight, self.qkv.bias), sites)


def paired_heads(attention: nn.Module, qkv: tuple[torch.Tensor, ...], sites: Sites) -> tuple[torch.Tensor, ...]:
    """q, k, v (batch, heads, tokens, 2 d) of parts (batch, tokens, width), each half of q and k normalised alone."""
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in qkv)
    q, k = (
        sites.call(norm, part.unflatten(-1, (2, attention.head_dim))).flatten(-2)
        for norm, part in ((attention.q_norm, q), (attention.k_norm, k))
    )
    return q, k, v


def attend_twice(
    attention: nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sites: Sites,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """What heads q, k, v (batch, heads, tokens, 2 d) make, as (batch, tokens that ask, width)."""
    share = attention._compute_lambda().type_as(q)
    (q1, q2), (k1, k2) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)
    if attention.fused_attn:
        dropout = attention.attn_drop_p if attention.training else 0.0
        options = {"attn_mask": attn_mask, "is_causal": is_causal, "dropout": dropout}
        x = attend(q1, k1, v, **options) - share * attend(q2, k2, v, **options)
    else:
        # As heads in pairs, of which the library calls one softmax and one dropout.
        q, k = torch.stack((q1, q2), dim=2).flatten(1, 2), torch.stack((k1, k2), dim=2).flatten(1, 2)
        weights = attention_weights(attention, q, k, attn_mask, is_causal).unflatten(1, (-1, 2))
        x = (weights[:, :, 0] - share * weights[:, :, 1]) @ v
    x = sites.call(attention.sub_norm, x) * (1 - attention.lambda_init)
    return x.transpose(1, 2).flatten(2)


@describe_attention.register
def _(attention: DiffAttention) -> tuple[type[nn.Module], dict[str, Layer]]:
    layers = qkv_layers(attention.qkv) | norm_layers(sub_norm=attention.sub_norm)
    return SitedDiffAttention, layers | attention_output_layers(attention)
