"""ReLoRA: High-Rank Training Through Low-Rank Updates (Lialin et al., 2023), https://arxiv.org/abs/2307.05695."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Tower
from visionpeft.methods.lora import LoRA, LowRank
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Measure, Method, require
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.methods.parts.trees import tree_of
from visionpeft.sites import Placement


class GrownRanks(LowRank):
    """y + scaling * (up down + earlier_up earlier_down) dropout(x): `LowRank` whose last ranks alone are trained.

    down (rank, in) is Kaiming-uniform with a = sqrt(5), up (out, rank) zero: no change at the start. What was trained
    before are buffers, earlier_down (earlier, in) and earlier_up (out, earlier).
    """

    output_side = ("up",)

    def __init__(self, layer: Layer, rank: int, earlier: int, scaling: float, dropout: float):
        nn.Module.__init__(self)  # A and B are no parameters here
        self.down = nn.Parameter(fresh(rank, layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))
        self.register_buffer("earlier_down", torch.zeros(earlier, layer.in_features))
        self.register_buffer("earlier_up", torch.zeros(layer.out_features, earlier))
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)

    @property
    def A(self) -> torch.Tensor:
        """All ranks (earlier + rank, in)."""
        return torch.cat([self.earlier_down, self.down])

    @property
    def B(self) -> torch.Tensor:
        """All ranks (out, earlier + rank)."""
        return torch.cat([self.earlier_up, self.up], dim=1)

    def low_rank(self) -> LowRank:
        """The same change with one pair."""
        A, B = self.A.detach(), self.B.detach()
        change = LowRank(A.shape[1], len(B), len(A), self.scaling, self.dropout.p).to(B)
        change.A.data, change.B.data = A, B
        return change


def fresh(rank: int, in_features: int) -> torch.Tensor:
    """A as it is drawn at every start, (rank, in)."""
    return nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5))


@dataclass(frozen=True)
class ReLoRA(Method):
    """LoRA that is added to the weights and begun again, so that the change grows beyond its rank.

    `restarts` + 1 stages (`visionpeft.stages`; the command line does all), each from where the last one ended: at a
    restart W becomes W + (alpha / rank) B A, A is drawn again and B is zero, so that outputs stay what they are. The
    backbone is never written: what was added is kept as pairs that are no longer trained, so after k restarts the
    change has up to (k + 1) rank ranks, and `save` writes it as `LoRA` of as many. Every stage has a new optimiser (the
    published code prunes nearly all of its state) and its own warm-up and schedule. Its head trains on. The scale is no
    parameter: in the published code a trained scale is set to zero together with B, and neither moves again.
    Made for pre-training; on a small data set it is dear for what it adds. Mergeable.
    Trained in each stage: sum over target layers of rank * (in + out); 294,912 on ViT-B/16 for rank 8 on q and v.
    Source: Lialin, Muckatira, Shivagunde, Rumshisky, ReLoRA: High-Rank Training Through Low-Rank Updates, 2023.

    Args:
        rank: rank of the change that is trained.
        alpha: numerator of the scale alpha / rank; None for a scale of 1.
        restarts: how often it is begun again.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        dropout: dropout on the input of A.
        restarted: how often it has been begun again; counted after a stage, not to be given.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    rewinds = False
    found: ClassVar[tuple[str, ...]] = ("restarted",)

    rank: int = 8
    alpha: float | None = None
    restarts: int = 3
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    restarted: int = 0
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.rank > 0, self, "rank must be a positive integer")
        require(self.restarts > 0, self, "restarts must be a positive integer; without any it is LoRA")
        require(0 <= self.restarted <= self.restarts, self, f"restarted must be from 0 to {self.restarts}")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        require_targets(self)

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def stages_after(self) -> int:
        """As many as there are restarts to come."""
        return max(0, self.restarts - self.restarted)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `GrownRanks` at every target layer of the chosen blocks."""
        for index, layer in target_layers(self, tower):
            module = GrownRanks(layer, self.rank, self.restarted * self.rank, self.scaling, self.dropout)
            yield Placement(tower.name, index, layer.site, module)

    def next_stage(
        self,
        towers: Sequence[Tower],
        part: nn.Module,
        start: Mapping[str, torch.Tensor],
        trained: Mapping[str, torch.Tensor],
        measure: Measure,
    ) -> tuple[Method, dict[str, torch.Tensor]]:
        """Keep what was trained, and begin again beside it."""
        tensors = {}
        for path, module in grown_of(part).items():
            tensors |= {
                f"{path}.earlier_down": module.A.detach().clone(),
                f"{path}.earlier_up": module.B.detach().clone(),
                f"{path}.down": fresh(*module.down.shape),
                f"{path}.up": torch.zeros_like(module.up),
            }
        return dataclasses.replace(self, restarted=self.restarted + 1), tensors

    def fold(self, part: nn.Module) -> tuple[LoRA, nn.Module]:
        """LoRA of all ranks."""
        rank = (self.restarted + 1) * self.rank
        fields = {"targets": self.targets, "dropout": self.dropout, "blocks": self.blocks, "towers": self.towers}
        lora = LoRA(rank=rank, alpha=None if self.alpha is None else self.scaling * rank, **fields)
        return lora, tree_of({path: module.low_rank() for path, module in grown_of(part).items()})


def grown_of(part: nn.Module) -> dict[str, GrownRanks]:
    """By path, <tower>.<block>.<site>."""
    return {path: module for path, module in part.named_modules() if isinstance(module, GrownRanks)}
