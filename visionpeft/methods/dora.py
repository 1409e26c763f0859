"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., 2024), https://arxiv.org/abs/2402.09353."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn as nn

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.quantised import full_precision
from visionpeft.backbones.tower import Tower
from visionpeft.methods.lora import LowRank
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method
from visionpeft.methods.parts.targets import ranked_layers, require_low_rank
from visionpeft.sites import Order, Placement


class DecomposedLowRank(LowRank):
    """Gives every row of a weight a trained length: m * V / |V| with V = W + (alpha / rank) B A, |V| (out,) by rows.

    A and B are those of `LowRank`; m (out,) starts as |W|: no change at the start.
    """

    order = Order.RENEW

    def __init__(self, layer: Layer, rank: int, scaling: float, dropout: float):
        super().__init__(layer.in_features, layer.out_features, rank, scaling, dropout)
        weight = full_precision(layer.matrix.detach())
        self.magnitude = nn.Parameter(lengths(weight if weight.dtype == torch.float64 else weight.float()))

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (..., in) and output y (..., out) of the layer to the changed output (..., out)."""
        y = super().forward(x, y, weight, bias)
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            length = lengths(full_precision(weight).to(self.B.dtype) + self.scaling * (self.B @ self.A))
        factor = self.magnitude / length
        changed = y * factor if bias is None else torch.addcmul((1 - factor) * bias, y, factor)
        return changed.to(y.dtype)

    def merge(self, weight: torch.Tensor, bias):
        """Weight and bias that compute the same: m * V / |V| and b."""
        direction, bias = super().merge(weight, bias)
        return direction * (self.magnitude.to(weight) / lengths(direction.detach()))[:, None], bias


def lengths(weight: torch.Tensor) -> torch.Tensor:
    """Length of every row of a weight (out, in): (out,)."""
    return weight.norm(dim=1).clamp_min(torch.finfo(weight.dtype).tiny)


@dataclass(frozen=True)
class DoRA(Method):
    """Low-rank change of the direction of weight rows and a trained length: m * V / |V|, V = W + (alpha / rank) B A.

    |V| is the length of each row, one for each output feature. Its gradient is left out, as the paper proposes to save
    memory (section 4.3): the step changes V as if |V| were constant. Acts on the rows of q, k and v separately, also
    where the backbone keeps them in one matrix, and on the backbone's own weight, before other methods change it.
    Mergeable, but not two of them at one layer.
    With `dropout`, published code drops the input of the whole change, V - W and the rescaling of W; here, as for LoRA,
    that of A alone. Without dropout, as in the shipped configurations, both are the formula.
    Trainable: sum over target layers of rank * (in + out) + out; 313,344 on ViT-B/16 for rank 8 on q and v.
    Source: Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024.

    Args:
        rank: rank r of the change.
        alpha: numerator of the scale alpha / rank; None for a scale of 1.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        dropout: dropout on the input of A.
        overrides: other ranks for some blocks or targets, such as {"fc1": 4, "last:4": 16, "first:2/q": 2}.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    overrides: dict[str, int] = field(default_factory=dict)
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require_low_rank(self)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `DecomposedLowRank` at every target layer of the chosen blocks."""
        for index, layer, rank, scaling in ranked_layers(self, tower):
            yield Placement(tower.name, index, layer.site, DecomposedLowRank(layer, rank, scaling, self.dropout))
