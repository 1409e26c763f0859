"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), https://arxiv.org/abs/2106.09685."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks, Overrides
from visionpeft.methods.parts.base import Method, require, require_same, to_parameter_dtype
from visionpeft.methods.parts.targets import require_low_rank, target_layers
from visionpeft.sites import Order, Placement


class LowRank(nn.Module):
    """y + (alpha / rank) B A dropout(x) for a linear layer y = W x + b.

    A (rank, in) is Kaiming-uniform with a = sqrt(5), B (out, rank) is zero: no change at the start. Without `train_A`
    A is a buffer, saved like a parameter.
    """

    order = Order.WEIGHT
    output_side = ("B",)
    padded: ClassVar = {"A": 0, "B": 1}

    def __init__(
        self, in_features: int, out_features: int, rank: int, scaling: float, dropout: float, train_A: bool = True
    ):
        super().__init__()
        A = nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5))
        if train_A:
            self.A = nn.Parameter(A)
        else:
            self.register_buffer("A", A)
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (..., in) and output y (..., out) of the layer to the changed output (..., out)."""
        z = self.scaling * F.linear(self.dropout(to_parameter_dtype(x, self.A)), self.A)
        if is_fx_symbolic_tracing() or z.dtype != y.dtype:
            return y + F.linear(z, self.B).to(y.dtype)
        # One pass over the wide output instead of a product, a scaling and a sum.
        return torch.addmm(y.flatten(0, -2), z.flatten(0, -2), self.B.to(z.dtype).t()).view(y.shape)

    def row_values(self) -> dict[str, torch.Tensor | float]:
        """A, B and the scale."""
        return {"A": self.A, "B": self.B, "scaling": self.scaling}

    def by_row(self, values: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """What `forward` gives, with A (rows, rank, in), B (rows, out, rank) and a scale (rows,) of each row."""
        z = torch.bmm(self.dropout(to_parameter_dtype(x, values["A"])).flatten(1, -2), values["A"].mT)
        z = values["scaling"][:, None, None] * z
        flat = y.flatten(1, -2)
        if z.dtype != y.dtype:
            return (flat + torch.bmm(z, values["B"].mT).to(y.dtype)).view(y.shape)
        return torch.baddbmm(flat, z, values["B"].to(z.dtype).mT).view(y.shape)

    def low_rank_change(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """A, B and alpha / rank, if that is all: no dropout is drawn."""
        drawn = self.dropout.training and self.dropout.p > 0
        return None if drawn else (self.A, self.B, self.scaling)

    def merge(self, weight: torch.Tensor, bias):
        """Weight and bias that compute the same: W + (alpha / rank) B A."""
        return weight + self.scaling * (self.B.to(weight) @ self.A.to(weight)).view_as(weight), bias


class LowRankConv(LowRank):
    """`LowRank` for a convolution: A (rank, in * height * width) is applied as a kernel, B to each position."""

    stackable = True
    on_images = True

    def __init__(self, convolution: nn.Conv2d, rank: int, scaling: float, dropout: float, train_A: bool = True):
        super().__init__(convolution.weight[0].numel(), convolution.out_channels, rank, scaling, dropout, train_A)
        self.kernel = convolution.weight.shape[1:]
        self.geometry = {"stride": convolution.stride, "padding": convolution.padding, "dilation": convolution.dilation}

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map the convolution's input x (batch, in, H, W) and output y (batch, out, h, w) to the changed output."""
        x = self.dropout(to_parameter_dtype(x, self.A))
        z = F.conv2d(x, self.A.view(-1, *self.kernel), **self.geometry)
        return y + self.scaling * F.conv2d(z, self.B[:, :, None, None]).to(y.dtype)


def low_rank_at(layer: Layer, rank: int, scaling: float, dropout: float, train_A: bool = True) -> LowRank:
    """The low-rank change of a linear layer, or of a convolution that is not in groups."""
    if layer.kind == "conv" and layer.changed != "always":
        return LowRankConv(layer.owner, rank, scaling, dropout, train_A)
    return LowRank(layer.in_features, layer.out_features, rank, scaling, dropout, train_A)


def concatenated(
    parts: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float], scales: Sequence[Callable[[int], float]]
) -> tuple[int, dict[str, torch.Tensor]]:
    """Rank and tensors "A" and "B" of low-rank changes that are weighted sums of those of several adapters.

    `scales` are the factors of B A by its rank. Every layer gets the sum of the adapters' largest ranks. What a layer
    does not use of it starts as in `LowRank`.
    """
    layers = [[path.removesuffix("A") for path in part if path.rpartition(".")[2] == "A"] for part in parts]
    ranks = [
        max((len(part[f"{path}A"]) for path in paths), default=0) for part, paths in zip(parts, layers, strict=True)
    ]
    tensors = {}
    for path in dict.fromkeys(path for paths in layers for path in paths):
        having = next(part for part in parts if f"{path}A" in part)
        like_a, like_b = having[f"{path}A"], having[f"{path}B"]
        a, b = like_a.new_empty(sum(ranks), like_a.shape[1]), like_b.new_zeros(len(like_b), sum(ranks))
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        start = 0
        for part, weight, scale, most in zip(parts, weights, scales, ranks, strict=True):
            if f"{path}A" in part:
                rank = len(part[f"{path}A"])
                a[start : start + rank] = part[f"{path}A"]
                b[:, start : start + rank] = weight * scale(rank) * part[f"{path}B"]
            start += most
        tensors |= {f"{path}A": a, f"{path}B": b}
    return sum(ranks), tensors


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank change of weight matrices: W + (alpha / rank) B A, each target with its own A and B.

    Acts on the rows of q, k and v separately, also where the backbone keeps them in one matrix. Mergeable.
    The weight of a convolution is taken as a matrix (out, in / groups * height * width), so that A is a convolution of
    `rank` kernels and B a 1 x 1 one after it.
    `rank_stabilised` makes the scale alpha / sqrt(rank) (rsLoRA), with which the change neither dies nor explodes as
    the rank grows. Without `train_A` only B is trained (LoRA-FA): half the values, and A, drawn as ever, is saved.
    Memory is no reason for it here, where no input of A is kept anyway; and the optimiser of that name in peft, which
    divides the gradient of B by A A^T, is not part of it.
    Trainable: sum over target layers of rank * (in + out); 294,912 on ViT-B/16 for rank 8 on q and v, without A half.
    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021. Kalajdzievski, A Rank Stabilization
    Scaling Factor for Fine-Tuning with LoRA, 2023. Zhang et al., LoRA-FA: Memory-efficient Low-rank Adaptation, 2023.

    Args:
        rank: rank r of the change.
        alpha: numerator of the scale alpha / rank; None for a scale of 1.
        targets: layers, out of q k v proj fc1 fc2 gate patch_embed; fc1 covers both halves of a gated MLP. Of a model
            that has layer sites only: all linears convolutions pointwise grouped, or the names of its layers.
        dropout: dropout on the input of A. It costs memory and time; the papers on ViTs use 0 to 0.1.
        overrides: other ranks for some blocks or targets, such as {"fc1": 4, "last:4": 16, "first:2/q": 2}.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
        rank_stabilised: divide alpha, which must be given, by the square root of the rank.
        train_A: whether A is trained, too.
    """

    needs_blocks: ClassVar = False
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    overrides: dict[str, int] = field(default_factory=dict)
    blocks: Blocks = "all"
    towers: str | list[str] | None = None
    rank_stabilised: bool = False
    train_A: bool = True

    def __post_init__(self):
        super().__post_init__()
        require_low_rank(self)
        given = self.alpha is not None or not self.rank_stabilised
        require(given, self, "rank_stabilised divides alpha by the square root of the rank, so alpha must be given")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `LowRank` at every target layer of the chosen blocks."""
        ranks = Overrides(self.rank, self.overrides, tower, self.targets, "LoRA overrides")
        for index, layer in target_layers(self, tower, ("linear", "conv")):
            rank = ranks.at(index, layer.named_by(self.targets))
            module = low_rank_at(layer, rank, self.scale(rank), self.dropout, self.train_A)
            yield Placement(tower.name, index, layer.site, module)

    def combine(self, methods, parts, weights):
        """LoRA that changes each weight by the weighted sum of the changes: ranks are put one after another."""
        require_same(methods, but=("rank", "alpha", "overrides", "dropout", "rank_stabilised"))
        rank, tensors = concatenated(parts, weights, [method.scale for method in methods])
        changed = {"rank": rank, "alpha": None, "overrides": {}, "rank_stabilised": False}
        return dataclasses.replace(self, **changed), tensors

    def scale(self, rank: int) -> float:
        """Factor of B A where it has this rank."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(rank) if self.rank_stabilised else rank)
