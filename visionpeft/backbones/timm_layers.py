"""Layers that several timm families share: the plain attention, and the layer sites of timm's MLPs."""

import torch
import torch.nn as nn
from timm.layers import Attention, GluMlp, Mlp, SwiGLU
from timm.models.vitamin import GeGluMlp

from visionpeft.backbones.attention import attend_as, fused_qkv, qkv_layers
from visionpeft.backbones.dispatch import describe_attention, describe_mlp, norm_layers
from visionpeft.backbones.layer import Layer
from visionpeft.errors import UnsupportedError
from visionpeft.sites import UNTOUCHED, Sites
from visionpeft.sites.asking import ONLY_KEYS


class SitedAttention(Attention):
    """timm `Attention` (fused qkv, optional query and key normalisation and output gate) with sites q, k, v and kv."""

    sites: Sites

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """Attend over tokens (batch, tokens, width)."""
        return plain_attention(self, x, self.sites, attn_mask, is_causal)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over tokens (batch, tokens, width) as the backbone does, without what acts at the sites."""
        return plain_attention(self, x, UNTOUCHED)


def plain_heads(attention: nn.Module, x: torch.Tensor, sites: Sites) -> tuple[torch.Tensor, ...]:
    """q, k, v (batch, heads, tokens, head width) of tokens x (batch, tokens, width), with what acts at these sites."""
    qkv = fused_qkv(sites, x, attention.qkv, attention.qkv.weight, attention.qkv.bias)
    q, k, v = (part.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2) for part in qkv)
    return sites.call(attention.q_norm, q), sites.call(attention.k_norm, k), v


def plain_attention(
    attention: nn.Module, x: torch.Tensor, sites: Sites, attn_mask: torch.Tensor | None = None, is_causal: bool = False
) -> torch.Tensor:
    """What timm's `Attention` does with tokens (batch, tokens, width), and what acts at these sites."""
    gate = sites.call(attention.gate, sites.followed(x)).sigmoid() if attention.gate is not None else None
    q, k, v = plain_heads(attention, x, sites)
    k, v = sites.kv(k, v, x, lambda h: plain_heads(attention, h, ONLY_KEYS)[1:])
    x = attend_as(attention, q, k, v, attn_mask=attn_mask, is_causal=is_causal, fused=attention.fused_attn)
    x = sites.call(attention.norm, x.transpose(1, 2).flatten(2))
    if gate is not None:
        x = x * gate
    return attention.proj_drop(sites.call(attention.proj, x))


@describe_attention.register
def _(attention: Attention) -> tuple[type[nn.Module], dict[str, Layer]]:
    return SitedAttention, qkv_layers(attention.qkv) | attention_output_layers(attention)


def attention_output_layers(attention: nn.Module) -> dict[str, Layer]:
    """Layer sites around timm's attention proper: norms of q, k and the output, gate and output projection."""
    layers = norm_layers(q_norm=attention.q_norm, k_norm=attention.k_norm, attn_norm=attention.norm)
    if getattr(attention, "gate", None) is not None:
        layers["gate"] = Layer("gate", "linear", attention.gate)
    return layers | {"proj": Layer("proj", "linear", attention.proj)}


@describe_mlp.register(Mlp)
@describe_mlp.register(GluMlp)
def _(mlp: Mlp | GluMlp) -> dict[str, Layer]:
    if not isinstance(mlp.fc1, nn.Linear):
        raise UnsupportedError(f"{type(mlp).__name__} with {type(mlp.fc1).__name__} layers is not a token MLP")
    fc1, fc2 = Layer("fc1", "linear", mlp.fc1), Layer("fc2", "linear", mlp.fc2)
    return {"fc1": fc1} | norm_layers(mlp_norm=mlp.norm) | {"fc2": fc2}


@describe_mlp.register
def _(mlp: SwiGLU) -> dict[str, Layer]:
    layers = {site: Layer(site, "linear", getattr(mlp, site), target="fc1") for site in ("fc1_g", "fc1_x")}
    return layers | norm_layers(mlp_norm=mlp.norm) | {"fc2": Layer("fc2", "linear", mlp.fc2)}


@describe_mlp.register
def _(mlp: GeGluMlp) -> dict[str, Layer]:
    norm = norm_layers(mlp_norm=mlp.norm)
    reads = "" if norm else None  # the norm is before both halves
    halves = {
        "fc1_g": Layer("fc1_g", "linear", mlp.w0, target="fc1", reads=reads),
        "fc1_x": Layer("fc1_x", "linear", mlp.w1, target="fc1", reads=reads),
    }
    return norm | halves | {"fc2": Layer("fc2", "linear", mlp.w2)}
