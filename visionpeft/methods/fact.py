"""FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer (Jie and Deng, 2023).

https://arxiv.org/abs/2212.03145
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require, to_parameter_dtype
from visionpeft.sites import Order, Placement, Shared

TARGETS = ("q", "k", "v", "proj", "fc1", "fc2")
DECOMPOSITIONS = ("tt", "tk")


class Factors(nn.Module):
    """What all changes of a tower share: U (rank, width), V (width, rank), and for Tucker the core (rank, rank, rank).

    U is uniform with bound 1 / sqrt(width), V zero, the core Xavier-uniform.
    """

    def __init__(self, width: int, rank: int, tucker: bool):
        super().__init__()
        self.U = nn.Parameter(torch.empty(rank, width).uniform_(-(width**-0.5), width**-0.5))
        self.V = nn.Parameter(torch.zeros(width, rank))
        if tucker:
            self.core = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, rank, rank)))


class FactoredChange(nn.Module):
    """y + scale * dW x for a linear layer, dW in parts of width x width: V S_ij U, S_ij (rank, rank) the layer's own.

    A layer that is n times as wide as the tokens has n rows or columns of parts; of the last, what is too much is cut.

    Args:
        factors: what it shares with the other layers; owned by the adapter.
        layer: the layer.
        width: width of the tokens.
        scale: a fixed number.
        dropout: dropout before V.
    """

    stackable = True
    order = Order.WEIGHT

    def __init__(self, factors: Factors, layer: Layer, width: int, scale: float, dropout: float):
        super().__init__()
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.rows, self.columns = math.ceil(self.out_features / width), math.ceil(self.in_features / width)
        self.width = width
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self._factors = (factors,)  # in a tuple, because the adapter owns them once for all blocks

    @abstractmethod
    def inner(self) -> torch.Tensor:
        """The matrix (rows * rank, columns * rank) of all S_ij."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (..., in) and output y (..., out) of the layer to the changed output (..., out)."""
        (factors,) = self._factors
        x = to_parameter_dtype(x, factors.U)
        missing = self.columns * self.width - self.in_features
        x = (F.pad(x, (0, missing)) if missing else x).unflatten(-1, (self.columns, self.width))
        z = F.linear(F.linear(x, factors.U).flatten(-2), self.inner())
        z = self.dropout(self.scale * z).unflatten(-1, (self.rows, -1))
        return y + F.linear(z, factors.V).flatten(-2)[..., : self.out_features].to(y.dtype)

    def merge(self, weight: torch.Tensor, bias):
        """Weight and bias that compute the same: W + scale * dW and b."""
        (factors,) = self._factors
        U, V = factors.U.to(weight), factors.V.to(weight)
        inner = self.inner().to(weight).view(self.rows, -1, self.columns, len(U))
        change = torch.einsum("dp,ipjq,qe->idje", V, inner, U).flatten(0, 1).flatten(1, 2)
        return weight + self.scale * change[: self.out_features, : self.in_features], bias


class TensorTrain(FactoredChange):
    """`FactoredChange` whose S_ij are learned themselves, uniform with bound 1 / sqrt(columns * rank)."""

    def __init__(self, factors: Factors, layer: Layer, width: int, scale: float, dropout: float):
        super().__init__(factors, layer, width, scale, dropout)
        rank = len(factors.U)
        bound = (self.columns * rank) ** -0.5
        self.S = nn.Parameter(torch.empty(self.rows * rank, self.columns * rank).uniform_(-bound, bound))

    def inner(self) -> torch.Tensor:
        """The learned matrix."""
        return self.S


class Tucker(FactoredChange):
    """`FactoredChange` whose S_ij are mixtures of the slices of the shared core: S_ij = sum_s core[:, :, s] P[s, ij].

    P (rank, rows * columns) is uniform with bound sqrt(6 / (rank + num_parts)): the layer's columns of a Xavier-uniform
    matrix (rank, num_parts) for all parts of the tower.
    """

    def __init__(self, factors: Factors, layer: Layer, width: int, scale: float, dropout: float, num_parts: int):
        super().__init__(factors, layer, width, scale, dropout)
        rank = len(factors.U)
        bound = math.sqrt(6 / (rank + num_parts))
        self.P = nn.Parameter(torch.empty(rank, self.rows * self.columns).uniform_(-bound, bound))

    def inner(self) -> torch.Tensor:
        """The mixtures as one matrix."""
        (factors,) = self._factors
        mixed = (factors.core @ self.P).unflatten(-1, (self.rows, self.columns))
        return mixed.permute(2, 0, 3, 1).flatten(0, 1).flatten(1, 2)


@dataclass(frozen=True)
class FacT(Method):
    """Low-rank changes of all weight matrices with factors that the blocks share: W + scale * V S U.

    The matrices q, k, v and proj are one part of D x D each, fc1 and fc2 four; all parts of the tower share one U
    (rank, D) and one V (D, rank). "tt": S (rank, rank) of each part is learned. "tk": S = core x_3 p, with one core
    (rank, rank, rank) for all parts and p (rank,) of each. Of layers that are no multiple of D wide, such as those of
    some gated MLPs, which the paper does not have, the last part is cut. V is zero: no change at the start. Mergeable.
    The authors' code of "tk" interleaves rank and slice in the parts of fc1 and fc2, and transposes the core for fc2;
    this is the formula. "tt" is theirs exactly.
    Trainable on L blocks of width D: 2 D r + 12 L r^2 or 2 D r + 12 L r + r^3; on ViT-B/16 61,440 for "tt" with rank 16
    and 86,528 for "tk" with rank 32.
    Source: Jie and Deng, FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer, 2023.

    Args:
        rank: rank r of the factors.
        decomposition: "tt" (tensor train) or "tk" (Tucker).
        scale: a fixed number; the paper chooses it per task from 0.01 to 100.
        targets: layers, out of q k v proj fc1 fc2; fc1 covers both halves of a gated MLP.
        dropout: dropout before V; 0.1 in the paper.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both, each with its own factors; by default the image tower.
    """

    rank: int = 16
    decomposition: str = "tt"
    scale: float = 1.0
    targets: tuple[str, ...] = TARGETS
    dropout: float = 0.1
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.rank > 0, self, "rank must be a positive integer")
        allowed = self.decomposition in DECOMPOSITIONS
        require(allowed, self, f"decomposition must be 'tt' or 'tk', not {self.decomposition!r}")
        known = set(self.targets) <= set(TARGETS) and self.targets
        require(known, self, f"targets must be a list out of {', '.join(TARGETS)}, not {self.targets!r}")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")

    def place(self, tower: Tower) -> Iterator[Placement | Shared]:
        """The shared `Factors`, and one `FactoredChange` at every target layer of the chosen blocks."""
        blocks, tucker = blocks_of(self, tower), self.decomposition == "tk"
        width = tower.width_of(blocks)
        layers = [(i, layer) for i, layer in tower.all_layers() if i in blocks and layer.target in self.targets]
        factors = Factors(width, self.rank, tucker)
        yield Shared(tower.name, "factors", factors)
        num_parts = sum(math.ceil(s.out_features / width) * math.ceil(s.in_features / width) for _, s in layers)
        for index, layer in layers:
            if tucker:
                module = Tucker(factors, layer, width, self.scale, self.dropout, num_parts)
            else:
                module = TensorTrain(factors, layer, width, self.scale, self.dropout)
            yield Placement(tower.name, index, layer.site, module)
