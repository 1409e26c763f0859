"""HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models (Huang et al., 2025).

https://openreview.net/forum?id=TwJrTz9cRS
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
from visionpeft.sites import Order, Placement


class HadamardChange(WeightChange):
    """y + (W0 * (B A)) x, entry by entry.

    A (rank, in) is Kaiming-uniform with a = sqrt(5), B (out, rank) is zero: no change at the start.
    """

    order = Order.RENEW
    output_side = ("B",)

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def change(self, like: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """W0 * (B A) (out, in)."""
        return weight * (self.B.to(like) @ self.A.to(like))


@dataclass(frozen=True)
class HiRA(Method):
    """Change of a weight by itself times a low-rank matrix, entry by entry: W0 + W0 * (B A).

    The change may have a higher rank than B A, and a weight that is zero stays zero. Acts on the rows of q, k and v
    separately, on the backbone's own weight, before other methods change it. Mergeable, but not two of them at one
    layer. peft reads and writes it.
    Trainable: sum over target layers of rank * (in + out), as LoRA; 1,179,648 on ViT-B/16 for rank 32 on q and v.
    Source: Huang et al., HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models, 2025;
    formula and defaults as in peft.

    Args:
        rank: rank of B A.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    rank: int = 32
    targets: tuple[str, ...] = ("q", "v")
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.rank > 0, self, "rank must be a positive integer")
        require_targets(self)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `HadamardChange` at every target layer of the chosen blocks."""
        for index, layer in target_layers(self, tower):
            module = HadamardChange(layer.in_features, layer.out_features, self.rank)
            yield Placement(tower.name, index, layer.site, module)
