"""GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning (Jung et al., 2025).

https://arxiv.org/abs/2505.20355
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require, to_parameter_dtype
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.sites import Order, Placement


class GranularLowRank(nn.Module):
    """y + scaling * dW x where block (m, n) of k x k blocks of dW is B_m[:, part n] A_n[part m], parts of rank / k.

    A (k, rank, in / k): each A_n is Kaiming-uniform with a = sqrt(5); B (k, out / k, rank) is zero: no change at the
    start.
    """

    stackable = True
    order = Order.WEIGHT
    output_side = ("B",)

    def __init__(self, in_features: int, out_features: int, rank: int, cuts: int, scaling: float):
        super().__init__()
        self.A = nn.Parameter(torch.empty(cuts, rank, in_features // cuts))
        self.B = nn.Parameter(torch.zeros(cuts, out_features // cuts, rank))
        for part in self.A:
            nn.init.kaiming_uniform_(part, a=math.sqrt(5))
        self.scaling = scaling

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (..., in) and output y (..., out) of the layer to the changed output (..., out)."""
        cuts = len(self.A)
        x = to_parameter_dtype(x, self.A).unflatten(-1, (cuts, -1))
        z = torch.einsum("...ni,nri->...nr", x, self.A).unflatten(-1, (cuts, -1))  # (..., n, m, rank / k)
        z = z.transpose(-3, -2).flatten(-2)  # (..., m, rank): block row m reads its part of every n
        change = torch.einsum("...mr,mor->...mo", z, self.B).flatten(-2)
        return y + (self.scaling * change).to(y.dtype)

    def merge(self, weight: torch.Tensor, bias):
        """Weight and bias that compute the same: W + scaling * dW."""
        cuts = len(self.A)
        A = self.A.to(weight).unflatten(1, (cuts, -1))  # (n, m, rank / k, in / k)
        B = self.B.to(weight).unflatten(2, (cuts, -1))  # (m, out / k, n, rank / k)
        change = torch.einsum("monr,nmri->moni", B, A).flatten(2).flatten(0, 1)
        return weight + self.scaling * change, bias


@dataclass(frozen=True)
class GraLoRA(Method):
    """LoRA for each of k x k blocks of a weight: W + (alpha / rank) dW with blocks B_m[:, part n] A_n[part m].

    Each block has a change of rank / k of its own, so that the whole may reach k * rank with the numbers of one LoRA;
    one cut is LoRA. Acts on the rows of q, k and v separately. B is zero: no change at the start. Mergeable.
    peft's files of it are not read: of a fused qkv its blocks cross the borders of q, k and v; merge there, or keep the
    adapter in this library's own format.
    Trainable: sum over target layers of rank * (in + out), as LoRA; 1,179,648 on ViT-B/16 for rank 32 on q and v.
    Source: Jung et al., GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning, 2025; defaults as in
    peft, its optional plain LoRA beside ("hybrid") left out: attach `LoRA`, too.

    Args:
        rank: rank of a row or column of blocks, a multiple of `cuts`.
        cuts: number k of cuts of both sides, which divides the widths of every target.
        alpha: numerator of the scale alpha / rank; None for a scale of 1.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        blocks: which blocks of the backbone, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    rank: int = 32
    cuts: int = 2
    alpha: float | None = 64.0
    targets: tuple[str, ...] = ("q", "v")
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.cuts > 0, self, f"cuts must be a positive integer, not {self.cuts}")
        whole = self.rank > 0 and self.rank % self.cuts == 0
        require(whole, self, f"rank must be a positive multiple of cuts, {self.cuts}, not {self.rank}")
        require_targets(self)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `GranularLowRank` at every target layer of the chosen blocks."""
        scaling = 1.0 if self.alpha is None else self.alpha / self.rank
        for index, layer in target_layers(self, tower):
            widths = layer.in_features, layer.out_features
            fits = not any(width % self.cuts for width in widths)
            sentence = f"{layer.target} maps {widths[0]} to {widths[1]} features, which {self.cuts} cuts do not divide"
            require(fits, self, sentence)
            yield Placement(tower.name, index, layer.site, GranularLowRank(*widths, self.rank, self.cuts, scaling))
