"""UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning (Mao et al., 2022).

https://arxiv.org/abs/2110.07577
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.lora import LowRank
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require, to_parameter_dtype
from visionpeft.methods.parts.bottleneck import ACTIVATIONS, INITS, Bottleneck
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.methods.prefix_tuning import Prefix
from visionpeft.sites import Order, Placement


class SubmoduleGate(nn.Module):
    """One number in (0, 1) for each sample: the mean over its tokens of sigmoid(w x + c).

    w is N(0, 0.02), c zero: about one half at the start.
    """

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to (batch, 1, 1)."""
        return self.linear(to_parameter_dtype(x, self.linear.weight)).sigmoid().mean(dim=1, keepdim=True)


class GatedLowRank(nn.Module):
    """y + gate(x) (alpha / rank) B A dropout(x) for a linear layer y = W x + b."""

    stackable = True
    order = Order.WEIGHT
    tokenwise = False  # the gate is a mean over tokens
    reads_all_patches = True

    def __init__(self, low_rank: LowRank, width: int):
        super().__init__()
        self.low_rank = low_rank
        self.gate = SubmoduleGate(width)

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (batch, tokens, in) and output y (batch, tokens, out) of the layer to the changed output."""
        return self.low_rank((self.gate(x) * x).to(x.dtype), y, weight, bias)  # the change is linear in x


class GatedBottleneck(nn.Module):
    """x + gate(x) up(act(down x))."""

    stackable = True
    reads_all_patches = True

    def __init__(self, bottleneck: Bottleneck, width: int):
        super().__init__()
        self.bottleneck = bottleneck
        self.gate = SubmoduleGate(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        return x + (self.gate(x) * self.bottleneck(x)).to(x.dtype)


class GatedPrefix(nn.Module):
    """A `Prefix` times a gate: [gate P_k; k] and [gate P_v; v].

    The gate reads the input h of the attention, (batch, tokens, width), or else the values v as other methods left
    them.
    """

    stackable = True
    reads_all_patches = True

    def __init__(self, prefix: Prefix, width: int, reads_attention_input: bool):
        super().__init__()
        self.num_tokens = prefix.num_tokens
        self.reads_attention_input = reads_attention_input
        self.prefix = prefix
        self.gate = SubmoduleGate(width)

    def forward(
        self, k: torch.Tensor, v: torch.Tensor, h: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map k and v (batch, heads, tokens, head width) to (batch, heads, num_tokens + tokens, head width)."""
        gate = self.gate(h if self.reads_attention_input else v.transpose(1, 2).flatten(2))[..., None]
        alone = self.prefix(k[:, :, :0], v[:, :, :0])
        return tuple(torch.cat(((gate * p).to(x.dtype), x), dim=2) for p, x in zip(alone, (k, v), strict=True))


@dataclass(frozen=True)
class UniPELT(Method):
    """LoRA, prefix-tuning and an adapter after the MLP in every block, each with a gate that every image sets itself.

    A gate is the mean over tokens of sigmoid(w x + c). LoRA: W x + gate(x) (alpha / rank) B A x, each target its gate.
    Prefix, N(0, 0.02): [gate(h) P_k; k] and [gate(h) P_v; v], where h is the input of the attention. Adapter:
    m + gate(m) up(relu(down m)) on the output m of the MLP, both matrices N(0, 0.02): so not the backbone at the start.
    Not mergeable: the gates depend on the input. It acts on whole sequences, so in a text tower the gates see padding.
    Trainable on L blocks of width D: LoRA's, the prefix' and the adapter's own numbers and D + 1 for each gate;
    1,410,672 on ViT-B/16.
    Source: Mao et al., UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning, 2022, and the
    authors' code (morningmoni/UniPELT).

    Args:
        rank: rank of the low-rank changes.
        alpha: numerator of their scale alpha / rank; None for a scale of 1.
        targets: layers with low-rank changes, out of q k v proj fc1 fc2 gate.
        num_tokens: keys and values of the prefix.
        bottleneck: width of the adapter; the paper has D / 16.
        activation: of the adapter: gelu, relu, silu or identity.
        init: of the adapter: "bert" as the authors', "houlsby" (near identity), or "lora" (identity at the start).
        prefix_gate: what the prefix' gate reads: "input", what the attention reads, or "values", those of the tokens,
            which the low-rank change of v has changed already.
        dropout: dropout on the input of the low-rank changes and in the adapter.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    written_without = {"activation": "gelu", "init": "lora", "prefix_gate": "values"}  # noqa: RUF012

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("q", "v")
    num_tokens: int = 10
    bottleneck: int = 48
    activation: str = "relu"
    init: str = "bert"
    prefix_gate: Literal["input", "values"] = "input"
    dropout: float = 0.0
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("rank", "num_tokens", "bottleneck"):
            value = getattr(self, name)
            require(value > 0, self, f"{name} must be a positive integer")
        for name, allowed in (("activation", ACTIVATIONS), ("init", INITS)):
            value = getattr(self, name)
            require(value in allowed, self, f"{name} must be one of {', '.join(allowed)}, not {value!r}")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        require_targets(self)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """A gated low-rank change at every target, and in every chosen block a gated prefix and a gated adapter."""
        scaling = 1.0 if self.alpha is None else self.alpha / self.rank
        for index, layer in target_layers(self, tower):
            low_rank = LowRank(layer.in_features, layer.out_features, self.rank, scaling, self.dropout)
            yield Placement(tower.name, index, layer.site, GatedLowRank(low_rank, layer.in_features))
        for index in blocks_of(self, tower):
            block = tower.blocks[index]
            prefix = Prefix(self.num_tokens, block.attention_width)
            reads_input = self.prefix_gate == "input"
            width = block.width_at("attn_in") if reads_input else block.attention_width
            yield Placement(tower.name, index, "kv", GatedPrefix(prefix, width, reads_input))
            bottleneck = Bottleneck(
                block.width,
                self.bottleneck,
                activation=self.activation,
                scale=1.0,
                dropout=self.dropout,
                drop_path=0.0,
                init=self.init,
                serial=False,
            )
            yield Placement(tower.name, index, "mlp_out", GatedBottleneck(bottleneck, block.width))
