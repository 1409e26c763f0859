"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), https://arxiv.org/abs/2106.09685."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.addressing import Blocks, Overrides
from visionpeft.backbones.tower import Layer, Tower
from visionpeft.errors import ConfigurationError
from visionpeft.methods.base import Method, blocks_of, require
from visionpeft.methods.precision import to_parameter_dtype
from visionpeft.naming import nearest
from visionpeft.sites import Order, Placement


class LowRank(nn.Module):
    """y + (alpha / rank) B A dropout(x) for a linear layer y = W x + b.

    A (rank, in) is Kaiming-uniform with a = sqrt(5), B (out, rank) is zero: no change at the start.
    """

    order = Order.WEIGHT

    def __init__(self, in_features: int, out_features: int, rank: int, scaling: float, dropout: float):
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (..., in) and output y (..., out) of the layer to the changed output (..., out)."""
        z = self.scaling * F.linear(self.dropout(to_parameter_dtype(x, self.A)), self.A)
        if z.dtype != y.dtype:
            return y + F.linear(z, self.B).to(y.dtype)
        # One pass over the wide output instead of a product, a scaling and a sum.
        return torch.addmm(y.flatten(0, -2), z.flatten(0, -2), self.B.to(z.dtype).t()).view(y.shape)

    def merge(self, weight: torch.Tensor, bias):
        """Weight and bias that compute the same: W + (alpha / rank) B A."""
        return weight + self.scaling * (self.B.to(weight) @ self.A.to(weight)).view_as(weight), bias


class LowRankConv(LowRank):
    """`LowRank` for a patch convolution: A (rank, in * height * width) is applied as a kernel, B to each position."""

    def __init__(self, convolution: nn.Conv2d, rank: int, scaling: float, dropout: float):
        super().__init__(convolution.weight[0].numel(), convolution.out_channels, rank, scaling, dropout)
        self.kernel = convolution.weight.shape[1:]
        self.geometry = {"stride": convolution.stride, "padding": convolution.padding}

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map images x (batch, in, H, W) and patches y (batch, out, h, w) to changed patches."""
        x = self.dropout(to_parameter_dtype(x, self.A))
        z = F.conv2d(x, self.A.view(-1, *self.kernel), **self.geometry)
        return y + self.scaling * F.conv2d(z, self.B[:, :, None, None]).to(y.dtype)


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank change of weight matrices: W + (alpha / rank) B A, each target with its own A and B.

    Acts on the rows of q, k and v separately, also where the backbone keeps them in one matrix. Mergeable.
    Trainable: sum over target layers of rank * (in + out); 294,912 on ViT-B/16 for rank 8 on q and v.
    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.

    Args:
        rank: rank r of the change.
        alpha: numerator of the scale alpha / rank; None for a scale of 1.
        targets: layers, out of q k v proj fc1 fc2 gate patch_embed; fc1 covers both halves of a gated MLP.
        dropout: dropout on the input of A. It costs memory and time; the papers on ViTs use 0 to 0.1.
        overrides: other ranks for some blocks or targets, such as {"fc1": 4, "last:4": 16, "first:2/q": 2}.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    overrides: dict[str, int] = field(default_factory=dict)
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        ranks = [self.rank, *self.overrides.values()]
        require(all(isinstance(rank, int) and rank > 0 for rank in ranks), self, "rank must be a positive integer")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        require(len(self.targets) > 0 and not isinstance(self.targets, str), self, "targets must be a list of names")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `LowRank` at every target layer of the chosen blocks."""
        blocks = blocks_of(self, tower)
        layers = [(i, layer) for i, layer in tower.all_layers() if layer.kind != "norm" and (i is None or i in blocks)]
        self._check_targets({layer.target for _, layer in layers})
        ranks = Overrides(self.rank, self.overrides, tower.depth, self.targets, "LoRA overrides")
        for index, layer in layers:
            if layer.target in self.targets:
                yield Placement(tower.name, index, layer.site, self._module(layer, ranks.at(index, layer.target)))

    def _module(self, layer: Layer, rank: int) -> LowRank:
        scaling = 1.0 if self.alpha is None else self.alpha / rank
        if layer.kind == "conv":
            return LowRankConv(layer.owner, rank, scaling, self.dropout)
        return LowRank(layer.in_features, layer.out_features, rank, scaling, self.dropout)

    def _check_targets(self, available: set[str]) -> None:
        for target in self.targets:
            if target not in available:
                raise ConfigurationError(
                    f"LoRA: target {target!r} matches no layer; this backbone has {nearest(target, available)}"
                )
