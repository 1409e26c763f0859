"""What the sited attention classes share: keys and values in, attended values out."""

from collections.abc import Callable, Mapping

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.layer import Layer
from visionpeft.sites import UNTOUCHED, SitedLayer, Sites, frozen_layers
from visionpeft.sites.asking import attend_again

NOTHING: Mapping[str, torch.Tensor] = {}


def open_in_front(
    mask: torch.Tensor | None, is_causal: bool, queries: int, keys: int, like: torch.Tensor
) -> tuple[torch.Tensor | None, bool]:
    """Widen a mask (..., queries, n) to (..., queries, keys): the keys - n first columns are new, open to all."""
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
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + mask) v for heads (batch, heads, tokens, d); keys may be more than queries."""
    # Traced, a mask cannot be told from none, and the compiler decides what is kept.
    if not frozen_layers.traced() and attn_mask is None and not is_causal and dropout == 0:
        made = attend_again(q, k, v)
        if made is not None:
            return made
    attn_mask, is_causal = _for_all_keys(attn_mask, is_causal, q, k)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)


def attend_as(
    attention: nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    fused: bool = True,
) -> torch.Tensor:
    """`attend` with the scale and dropout of an attention module.

    Not fused, the weights (batch, heads, tokens that ask, keys) go through its `attn_drop`, which is called as the
    library calls it: a hook there reads the attention maps. Keys of prompts that are no tokens come first.
    """
    if fused:
        dropout = attention.attn_drop.p if attention.training else 0.0
        return attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal, dropout=dropout)
    return attention_weights(attention, q, k, attn_mask, is_causal) @ v


def attention_weights(
    attention: nn.Module, q: torch.Tensor, k: torch.Tensor, attn_mask: torch.Tensor | None, is_causal: bool
) -> torch.Tensor:
    """The weights (batch, heads, tokens that ask, keys) of an attention module, after its `attn_drop`."""
    attn_mask, is_causal = _for_all_keys(attn_mask, is_causal, q, k)
    scores = (q * attention.scale) @ k.transpose(-2, -1)
    return attention.attn_drop(_masked(scores, attn_mask, is_causal).softmax(dim=-1))


# Traced by torch.fx, a mask that is not there cannot be told from one that is: the next two are kept whole.
@torch.fx.wrap
def _masked(scores: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
    """Scores (batch, heads, queries, keys) with a mask (True where open) or bias (..., queries, keys)."""
    if is_causal:
        mask = scores.new_full(scores.shape[-2:], float("-inf")).triu_(1)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask


@torch.fx.wrap
def _for_all_keys(
    mask: torch.Tensor | None, is_causal: bool, q: torch.Tensor, k: torch.Tensor
) -> tuple[torch.Tensor | None, bool]:
    """The mask, widened where there are more keys than queries. Without a mask there is nothing to ask of shapes."""
    if (mask is None and not is_causal) or k.shape[-2] == q.shape[-2]:
        return mask, is_causal
    return open_in_front(mask, is_causal, q.shape[-2], k.shape[-2], q)


class AttendsAfterNorm:
    """Mixed into a sited block of timm's that reads norm1 of the stream: its attention as the backbone has it, with
    neither positions nor masks, and without what adapters do at its sites.
    """

    def attention_input(self, x: torch.Tensor, sites: Sites = UNTOUCHED) -> torch.Tensor:
        """What the attention reads of the stream x (batch, tokens, width), with what acts at these sites."""
        return sites.call(self.norm1, x)

    def attend(self, h: torch.Tensor) -> torch.Tensor:
        """The attention branch of h (batch, tokens, width) up to `attn_out`."""
        return self.attn.attend(h)


class AttendsToStream(AttendsAfterNorm):
    """Likewise for a block whose norms follow attention and MLP."""

    def attention_input(self, x: torch.Tensor, sites: Sites = UNTOUCHED) -> torch.Tensor:
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


def qkv_layers(qkv: nn.Linear) -> dict[str, Layer]:
    """Layer sites q, k, v that are thirds of one layer's weight, and of its bias if it has one."""
    rows = {} if qkv.bias is None else thirds(qkv.out_features // 3)
    return fused_qkv_layers(qkv, "weight", {site: (qkv, "bias", own) for site, own in rows.items()})


def thirds(width: int) -> dict[str, slice]:
    """Rows of q, k and v in a fused bias (3 width,)."""
    return {site: slice(index * width, (index + 1) * width) for index, site in enumerate("qkv")}


def fused_qkv(
    sites: Sites, x: torch.Tensor, layer: Callable[[torch.Tensor], torch.Tensor] | None, weight: torch.Tensor, bias
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (batch, tokens that ask, w) and k and v (batch, keys, w) of tokens x (batch, tokens, width).

    The keys are those of the prompts that are no tokens, first, and then those of all tokens.

    Args:
        sites: with what acts at q, k and v.
        x: the tokens.
        layer: the fused projection (..., width) -> (..., 3 w), or None if it is x W^T + b and need not be called.
        weight: its weight (3 w, width).
        bias: its bias (3 w,) or None.
    """
    prompts = sites.prompts(x)
    if sites.kept is None:
        q, k, v = apply_fused(sites, x, layer, weight, bias)
        if prompts is not None:
            q = q.contiguous()  # as a view it would keep the whole projection for the backward pass
    else:
        q, k, v = (
            _part(sites, site, frozen_layers.own(sites.followed(x)) if site == "q" else x, weight, bias)
            for site in "qkv"
        )
    if prompts is not None:
        hooked = isinstance(layer, nn.Module) and frozen_layers.is_hooked(layer)
        _, *others = apply_fused(sites, prompts, layer.forward if hooked else layer, weight, bias)
        k, v = (in_front(other, own) for other, own in zip(others, (k, v), strict=True))
    return q, k, v


def with_bias(attention: nn.Module, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The fused projection of an attention of timm's that keeps the bias outside of it, as `layer` of `fused_qkv`."""
    if bias is None:
        return attention.qkv
    return (lambda x: attention.qkv(x) + bias) if attention.qkv_bias_separate else None


def in_front(prompts: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Put (1 or batch, prompts, w) before (batch, tokens, w)."""
    return torch.cat((prompts.expand(x.shape[0], -1, -1), x), dim=1)


def _part(sites: Sites, site: str, x: torch.Tensor, weight: torch.Tensor, bias) -> torch.Tensor:
    rows = thirds(weight.shape[0] // 3)[site]
    return product_at(sites, site, x, weight[rows], None if bias is None else bias[rows])


def product_at(
    sites: Sites, site: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x W^T + b (..., out) of a weight that is read and not called, with what acts at its site."""
    y, ((_, acting),) = frozen_layers.linear(x, weight, bias, [(None, sites.acting.get(site, ()))])
    for module in acting:
        y = module(x, y, weight, bias)
    return y


def apply_fused(
    sites: Sites, x: torch.Tensor, layer: Callable[[torch.Tensor], torch.Tensor] | None, weight: torch.Tensor, bias
) -> tuple[torch.Tensor, ...]:
    """q, k, v (batch, tokens, w) of tokens x (batch, tokens, width), with what acts at each; see `fused_qkv`."""
    return apply_rows(sites, x, layer, weight, bias, thirds(weight.shape[0] // 3))


def apply_rows(
    sites: Sites,
    x: torch.Tensor,
    layer: Callable[[torch.Tensor], torch.Tensor] | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows_of: Mapping[str, slice],
    added: Mapping[str, torch.Tensor] = NOTHING,
) -> tuple[torch.Tensor, ...]:
    """The parts (batch, tokens, w) of the output of one layer, with what acts at the site of each.

    Args:
        sites: with what acts at these sites.
        x: the tokens (batch, tokens, width).
        layer: the layer, or None if it is x W^T + b and need not be called.
        weight: its weight (out, width).
        bias: its bias (out,) or None.
        rows_of: the rows of each site, which follow one another and are all.
        added: by site, a bias that is added to a part after the layer, which has none then.
    """
    acting = [(rows, sites.acting.get(site, ())) for site, rows in rows_of.items()]
    acts = any(modules for _, modules in acting)
    sizes = [rows.stop - rows.start for rows in rows_of.values()]

    def changed(x: torch.Tensor, y: torch.Tensor, acting: frozen_layers.Acting) -> list[torch.Tensor]:
        """The parts of y (batch, tokens, out), made of x, each with what is left to act there."""
        outputs, parts = [], y.split(sizes, dim=-1)
        for index, (site, (rows, modules)) in enumerate(zip(rows_of, acting, strict=True)):
            output = parts[index]  # and not by iterating, which torch.fx cannot trace
            own_bias = added.get(site, None if bias is None else bias[rows])
            if site in added:
                output = output + own_bias
            for module in modules:
                output = module(x, output, weight[rows], own_bias)
            outputs.append(output)
        return outputs

    if layer is None or frozen_layers.is_plain(layer):
        outputs = changed(x, *frozen_layers.linear(x, weight, bias, acting))
    elif acts and not added and isinstance(layer, SitedLayer) and "forward" not in vars(layer):
        # So hooks on the layer see what acts at its rows, and with the same x as the layer.
        y = layer(x, changed=lambda x, y: torch.cat(changed(x, y, acting), dim=-1))
        outputs = list(y.split(sizes, dim=-1))
    else:
        y = layer(x)
        if acts and not torch.is_grad_enabled() and isinstance(layer, nn.Module):
            y = y.clone()  # a hook may have kept what the layer gave, which modules may write to
        outputs = changed(x, y, acting)
    if acts:
        # A part of y that nothing has replaced would keep all of y for the backward pass.
        outputs = [frozen_layers.own(output) for output in outputs]
    return tuple(outputs)
