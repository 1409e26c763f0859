"""What the sited attention classes share: keys and values in, attended values out."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.tower import Layer
from visionpeft.sites import UNTOUCHED


def open_in_front(
    mask: torch.Tensor | None, is_causal: bool, queries: int, keys: int, like: torch.Tensor
) -> tuple[torch.Tensor | None, bool]:
    """Widen a mask (..., queries, n) to (..., queries, keys): the keys - n columns added in front are open to all."""
    if is_causal:
        mask, is_causal = like.new_full((queries, queries), float("-inf")).triu_(1), False
    if mask is None or mask.shape[-1] == keys:
        return mask, is_causal
    opened = mask.new_full((*mask.shape[:-1], keys - mask.shape[-1]), True if mask.dtype == torch.bool else 0.0)
    return torch.cat((opened, mask), dim=-1), is_causal


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
    fused: bool = True,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + mask) v for heads (batch, heads, tokens, d); keys may be more than queries."""
    if k.shape[-2] != q.shape[-2]:
        attn_mask, is_causal = open_in_front(attn_mask, is_causal, q.shape[-2], k.shape[-2], q)
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if is_causal:
        attn_mask = scores.new_full(scores.shape[-2:], float("-inf")).triu_(1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return F.dropout(scores.softmax(dim=-1), dropout) @ v


def dropout_of(attention: nn.Module) -> float:
    """The attention dropout in force."""
    return attention.attn_drop.p if attention.training else 0.0


class AttendsBehindNorm:
    """Mixed into a sited block of timm's that reads norm1 of the stream: its attention as the backbone has it, with
    neither positions nor masks, and without what adapters do at its sites.
    """

    def attention_input(self, x: torch.Tensor) -> torch.Tensor:
        """What the attention reads of the stream x (batch, tokens, width)."""
        return UNTOUCHED.call(self.norm1, x)

    def attend(self, h: torch.Tensor) -> torch.Tensor:
        """The attention branch of h (batch, tokens, width) up to `attn_out`."""
        return self.attn.attend(h)


class AttendsToStream(AttendsBehindNorm):
    """Likewise for a block whose norms follow attention and MLP."""

    def attention_input(self, x: torch.Tensor) -> torch.Tensor:
        """What the attention reads of the stream x (batch, tokens, width): the stream itself."""
        return x


def fused_qkv_layers(
    weight_owner: nn.Module, weight: str, bias: dict[str, tuple[nn.Module, str, slice | None]]
) -> dict[str, Layer]:
    """Layer sites q, k, v that are thirds of one weight (3 w, in).

    `bias` maps a site to (module, parameter name, rows); a site that is missing has no bias that is stored.
    """
    width = getattr(weight_owner, weight).shape[0] // 3
    layers = {}
    for index, site in enumerate("qkv"):
        owner, name, rows = bias.get(site, (None, "bias", None))
        layers[site] = Layer(
            site,
            "linear",
            weight_owner,
            weight=weight,
            bias_owner=owner,
            bias=name,
            rows=slice(index * width, (index + 1) * width),
            bias_rows=rows,
            called=False,
        )
    return layers


def thirds(width: int) -> dict[str, slice]:
    """Rows of q, k and v in a fused bias (3 width,)."""
    return {site: slice(index * width, (index + 1) * width) for index, site in enumerate("qkv")}


def apply_fused(sites, x: torch.Tensor, y: torch.Tensor, weight, bias) -> tuple[torch.Tensor, ...]:
    """Split a fused projection y (batch, tokens, 3 w) of x into q, k, v and apply what acts at each."""
    outputs = []
    for site, output in zip("qkv", y.chunk(3, dim=-1), strict=True):
        if sites.acting.get(site):
            rows = thirds(output.shape[-1])[site]
            output = sites.layer(site, x, output, weight[rows], None if bias is None else bias[rows])
        outputs.append(output)
    return tuple(outputs)
