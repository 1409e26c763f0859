"""RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models (Albert et al., 2025).

https://arxiv.org/abs/2502.00987
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.methods.parts.weight_change import WeightChange
from visionpeft.methods.vera import random_matrix
from visionpeft.sites import Placement, Shared


class RandomBases(nn.Module):
    """Frozen A (rank, narrow) and B (wide, bases * rank) for each shape of layers, wide >= narrow.

    They are functions of seed and shape, uniform with variance 2 / columns, and are not saved.
    """

    def __init__(self, rank: int, shapes: set[tuple[int, int]], seed: int):
        super().__init__()
        for wide, narrow in sorted(shapes):
            columns = math.ceil(narrow / rank) * rank
            self.register_buffer(f"A_{narrow}", random_matrix(rank, narrow, seed, 0), persistent=False)
            self.register_buffer(f"B_{wide}_{narrow}", random_matrix(wide, columns, seed, 1), persistent=False)


class ScaledBases(WeightChange):
    """y + scale * sum_j B_j diag(l_j) A diag(g_j) x with frozen A (rank, in) and B_j (out, rank), j = 1 ... n.

    A and B_j count with unit variance. l = row_scale (n, rank) starts at zero, g = column_scale (n, in) at
    1 / max(n, in), n = in / rank rounded up. Where out is below in, the change is the transpose, and in is out.
    """

    def __init__(self, bases: RandomBases, in_features: int, out_features: int, rank: int, scale: float):
        super().__init__()
        wide, narrow = max(in_features, out_features), min(in_features, out_features)
        number = math.ceil(narrow / rank)
        self.names = f"A_{narrow}", f"B_{wide}_{narrow}"
        self.transposed = out_features < in_features
        self._bases = (bases,)  # in a tuple, because the adapter owns them once for all layers
        self.factor = scale * math.sqrt(narrow / 2) * math.sqrt(number * rank / 2)  # the bases to unit variance
        self.row_scale = nn.Parameter(torch.zeros(number, rank))
        self.column_scale = nn.Parameter(torch.full((number, narrow), 1 / max(number, narrow)))

    def change(self, like: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """scale * sum_j B_j diag(l_j) A diag(g_j), or its transpose: (out, in)."""
        A, B = (getattr(self._bases[0], name).to(like) for name in self.names)
        scaled = (self.row_scale.to(like)[:, :, None] * A * self.column_scale.to(like)[:, None, :]).flatten(0, 1)
        change = self.factor * (B @ scaled)
        return change.t() if self.transposed else change


@dataclass(frozen=True)
class RandLoRA(Method):
    """Change of full rank by scaled random matrices: W + scale * sum_j B_j diag(l_j) A diag(g_j), A and B_j frozen.

    n = min(in, out) / rank bases, rounded up, can make any matrix of full rank; more of them train fewer numbers each,
    so a *smaller* rank trains more. A and B_j have entries of unit variance, are shared by all layers of one shape and
    follow from the seed bit by bit on every machine, so that a saved adapter holds l and g alone. l is zero: no change
    at the start. The change is formed whole in every step, which costs about as much as the layer itself on `in` more
    tokens: an option for full rank at small storage. Acts on the rows of q, k and v separately. Mergeable.
    peft draws its bases by PyTorch's generator in half precision and cuts those of the largest layer for the others;
    files are not exchanged with it, because no other generator makes the same bases again.
    Trainable: sum over target layers of n * (rank + min(in, out)); 460,800 on ViT-B/16 for rank 32 on q and v.
    Source: Albert et al., RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models, 2025; starts, scale and
    unit variance as in peft.

    Args:
        rank: rank of each of the n summands.
        scale: factor of the change; peft's alpha / rank is 20.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        seed: seed of A and all B_j.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    rank: int = 32
    scale: float = 20.0
    targets: tuple[str, ...] = ("q", "v")
    seed: int = 0
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.rank > 0, self, "rank must be a positive integer")
        require(self.seed >= 0, self, "seed must be an integer that is not negative")
        require_targets(self)

    def place(self, tower: Tower) -> Iterator[Placement | Shared]:
        """The random bases, and one `ScaledBases` at every target layer of the chosen blocks."""
        layers = target_layers(self, tower)
        sizes = [(layer.in_features, layer.out_features) for _, layer in layers]
        bases = RandomBases(self.rank, {(max(size), min(size)) for size in sizes}, self.seed)
        yield Shared(tower.name, "bases", bases)
        for (index, layer), size in zip(layers, sizes, strict=True):
            yield Placement(tower.name, index, layer.site, ScaledBases(bases, *size, self.rank, self.scale))
