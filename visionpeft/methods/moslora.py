"""MoSLoRA: Mixture-of-Subspaces in Low-Rank Adaptation (Wu et al., 2024), https://arxiv.org/abs/2406.11909."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.lora import LowRank
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method
from visionpeft.methods.parts.targets import ranked_layers, require_low_rank
from visionpeft.sites import Placement


class MixedSubspaces(LowRank):
    """y + scaling * up mixer down dropout(x): `LowRank` with A = mixer down and B = up.

    down (rank, in) and mixer (rank, rank) are Kaiming-uniform with a = sqrt(5), up (out, rank) is zero: no change.
    """

    output_side = ("up",)

    def __init__(self, in_features: int, out_features: int, rank: int, scaling: float, dropout: float):
        nn.Module.__init__(self)  # A and B are no parameters here
        self.down = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5)))
        self.mixer = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, rank), a=math.sqrt(5)))
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)

    @property
    def A(self) -> torch.Tensor:
        """mixer down (rank, in)."""
        return self.mixer @ self.down

    @property
    def B(self) -> torch.Tensor:
        """up (out, rank)."""
        return self.up


@dataclass(frozen=True)
class MoSLoRA(Method):
    """LoRA with a trained mixer of its subspaces between down and up: W + (alpha / rank) B M A, M (rank, rank).

    With M the identity it is LoRA, and M A is one A: peft reads what `export_peft` writes as LoRA. M is
    Kaiming-uniform with a = sqrt(5), as in the published code; an orthogonal start stands there as a comment. B is
    zero: no change at the start. Acts on the rows of q, k and v separately. Mergeable.
    Trainable: sum over target layers of rank * (in + out + rank); 296,448 on ViT-B/16 for rank 8 on q and v.
    Source: Wu et al., Mixture-of-Subspaces in Low-Rank Adaptation, 2024.

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
        """One `MixedSubspaces` at every target layer of the chosen blocks."""
        for index, layer, rank, scaling in ranked_layers(self, tower):
            module = MixedSubspaces(layer.in_features, layer.out_features, rank, scaling, self.dropout)
            yield Placement(tower.name, index, layer.site, module)
