"""CapaBoost: Increasing Model Capacity for Free (Song et al., 2024), https://arxiv.org/abs/2407.01320."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.lora import LowRank
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.seeded import mask
from visionpeft.methods.parts.targets import ranked_layers, require_low_rank
from visionpeft.sites import Placement


class MaskedCopies(LowRank):
    """y + scaling * sum_j (up * N_j) (down * M_j) dropout(x): `LowRank` of `copies` times the rank.

    down (rank, in) is Kaiming-uniform with a = sqrt(5), up (out, rank) is zero: no change at the start. The masks M_j
    and N_j of ones and zeros stay, follow from `seed`, and are not saved.
    """

    output_side = ("up",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scaling: float,
        dropout: float,
        copies: int,
        density: float,
        seed: tuple[int, ...],
    ):
        nn.Module.__init__(self)  # A and B are no parameters here
        self.down = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5)))
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        M = torch.cat([mask(rank, in_features, density, *seed, copy, 0) for copy in range(copies)])
        N = torch.cat([mask(out_features, rank, density, *seed, copy, 1) for copy in range(copies)], dim=1)
        self.register_buffer("M", M, persistent=False)
        self.register_buffer("N", N, persistent=False)

    @property
    def A(self) -> torch.Tensor:
        """The masked copies of down (copies * rank, in)."""
        return self.M * self.down.repeat(len(self.M) // len(self.down), 1)

    @property
    def B(self) -> torch.Tensor:
        """The masked copies of up (out, copies * rank)."""
        return self.N * self.up.repeat(1, self.N.shape[1] // self.up.shape[1])


@dataclass(frozen=True)
class CapaBoost(Method):
    """LoRA whose one pair is used several times under fixed random masks: W + s sum_j (B * N_j) (A * M_j).

    The change may reach n times the rank with the numbers of one LoRA, for n times the narrow products. The masks have
    ones with a probability of `density`; they differ between layers and copies, and follow from the seed bit by bit on
    every machine. B is zero: no change at the start. Acts on the rows of q, k and v separately. Mergeable. peft reads
    what `export_peft` writes as LoRA of n times the rank. Published code keeps n copies and adds up their gradients
    after the backward pass; here one pair gets them.
    Trainable: sum over target layers of rank * (in + out), as LoRA; 294,912 on ViT-B/16 for rank 8 on q and v.
    Source: Song et al., Increasing Model Capacity for Free: A Simple Strategy for Parameter Efficient Fine-tuning,
    2024; that n is 2 is recalled, not read.

    Args:
        rank: rank r of one copy.
        alpha: numerator of the scale alpha / rank; None for a scale of 1.
        copies: number n of masked copies, at most 64.
        density: share of ones in the masks, above 0 and at most 1.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        dropout: dropout on the input of A.
        overrides: other ranks for some blocks or targets, such as {"fc1": 4, "last:4": 16, "first:2/q": 2}.
        seed: seed of the masks.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    rank: int = 8
    alpha: float | None = None
    copies: int = 2
    density: float = 0.5
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    overrides: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require_low_rank(self)
        require(0 < self.copies <= 64, self, f"copies must be from 1 to 64, not {self.copies}")
        require(0 < self.density <= 1, self, f"density must be above 0 and at most 1, not {self.density}")
        require(self.seed >= 0, self, "seed must be an integer that is not negative")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `MaskedCopies` at every target layer of the chosen blocks."""
        for number, (index, layer, rank, scaling) in enumerate(ranked_layers(self, tower)):
            sizes = layer.in_features, layer.out_features, rank, scaling, self.dropout
            module = MaskedCopies(*sizes, self.copies, self.density, (self.seed, number))
            yield Placement(tower.name, index, layer.site, module)
