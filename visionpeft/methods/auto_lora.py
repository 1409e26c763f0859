"""AutoLoRA: Automatically Tuning Matrix Ranks in Low-Rank Adaptation (Zhang et al., 2024).

https://arxiv.org/abs/2403.09113
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Tower
from visionpeft.methods.adalora import lora_of_ranks
from visionpeft.methods.lora import LoRA, LowRank
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Measure, Method, require
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.methods.relora import fresh
from visionpeft.sites import Placement

ROUNDING = 1e-6  # of a softmax of equal numbers, which are all to be chosen


class SelectedRanks(LowRank):
    """y + scaling * up diag(softmax(selection)) down dropout(x), or without selection y + scaling * up down dropout(x).

    down (rank, in) is Kaiming-uniform with a = sqrt(5), up (out, rank) zero, selection (rank,) one: no change.
    """

    output_side = ("up",)

    def __init__(self, layer: Layer, rank: int, scaling: float, dropout: float, selects: bool):
        nn.Module.__init__(self)  # A and B are no parameters here
        self.down = nn.Parameter(fresh(rank, layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))
        self.selection = nn.Parameter(torch.ones(rank)) if selects else None
        self.target = layer.target
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)

    @property
    def A(self) -> torch.Tensor:
        """diag(softmax(selection)) down (rank, in)."""
        return self.down if self.selection is None else self.selection.softmax(0)[:, None] * self.down

    @property
    def B(self) -> torch.Tensor:
        """up (out, rank)."""
        return self.up

    def selected(self) -> int:
        """How many ranks have a share of at least 1 / rank."""
        shares = self.selection.detach().softmax(0)
        return int((shares >= (1 - ROUNDING) / len(shares)).sum())

    def acting(self) -> torch.Tensor:
        """Which ranks act: all of them (rank,)."""
        return torch.ones(len(self.down), dtype=torch.bool)

    def low_rank(self, rank: int) -> LowRank:
        """The same change with a scale of 1 and this rank, not below its own."""
        own = len(self.down)
        change = LowRank(self.down.shape[1], len(self.up), rank, 1.0, self.dropout.p).to(self.up)
        change.B.data[:, :own] = self.up.detach()
        change.A.data[:own] = self.scaling * self.down.detach()
        return change


@dataclass(frozen=True)
class AutoLoRA(Method):
    """LoRA with ranks of layers that are learnt on a part of the training data that is held out, then trained anew.

    Two stages (`visionpeft.stages`; the command line does both). In the first, W becomes
    W + (alpha / rank) B diag(softmax(s)) A with a selection s of every layer, all ones at the start: each rank has an
    equal share. A and B are trained on a part of the training data, and s by `visionpeft.Selection` on the rest, the
    share `held_out`, never on validation or test data: before each step of A and B, s goes down the gradient of the
    held-out loss after that step, which is looked ahead (DARTS, by finite differences). Then the rank of a layer is the
    number of shares of at least 1 / rank, from 1 to rank. A is drawn again and B is zero, the head goes back to where
    it began, and LoRA of these ranks with the same scale is trained on all data. Published code has softmax in the
    forward pass and takes the rank from s / sum(s), which is not what was trained; here it is softmax for both. A step
    of the first stage costs five passes instead of one. Mergeable; `save` writes `LoRA` with `overrides`.
    Trained in the first stage: sum over target layers of rank * (in + out + 1); 295,104 on ViT-B/16 for rank 8 on q
    and v; then rank * (in + out) of each layer's own rank, 294,912 if none falls.
    Source: Zhang, Qiang, Dai, Li, Xie, AutoLoRA: Automatically Tuning Matrix Ranks in Low-Rank Adaptation Based on Meta
    Learning, 2024, and the authors' code.

    Args:
        rank: rank of every layer in the first stage, and the highest in the second.
        alpha: numerator of the scale alpha / rank, which stays; None for a scale of 1.
        held_out: share of the training data on which ranks are selected.
        selection_lr: learning rate of the selections.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        dropout: dropout on the input of A.
        ranks: rank of each layer; found after the first stage, not to be given.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    found: ClassVar[tuple[str, ...]] = ("ranks",)

    rank: int = 8
    alpha: float | None = 16.0
    held_out: float = 0.3
    selection_lr: float = 3e-4
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    ranks: dict[str, int] | None = None
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.rank > 0, self, "rank must be a positive integer")
        require(0 < self.held_out < 1, self, f"held_out must be between 0 and 1, not {self.held_out}")
        require(self.selection_lr > 0, self, f"selection_lr must be positive, not {self.selection_lr}")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        require_targets(self)

    @property
    def stages_after(self) -> int:
        """One, until the ranks are selected."""
        return 1 if self.ranks is None else 0

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `SelectedRanks` at every target layer of the chosen blocks."""
        scaling = 1.0 if self.alpha is None else self.alpha / self.rank
        for index, layer in target_layers(self, tower):
            path = ".".join(str(each) for each in (tower.name, index, layer.site) if each is not None)
            rank = self.rank if self.ranks is None else self.ranks[path]
            module = SelectedRanks(layer, rank, scaling, self.dropout, selects=self.ranks is None)
            yield Placement(tower.name, index, layer.site, module)

    def selects(self, part: nn.Module) -> list[nn.Parameter]:
        """In the first stage, the selections."""
        return [module.selection for module in _selected(part).values() if module.selection is not None]

    def next_stage(
        self,
        towers: Sequence[Tower],
        part: nn.Module,
        start: Mapping[str, torch.Tensor],
        trained: Mapping[str, torch.Tensor],
        measure: Measure,
    ) -> tuple[Method, dict[str, torch.Tensor]]:
        """Count the ranks that are selected, and begin with as many."""
        ranks, tensors = {}, {}
        for path, module in _selected(part).items():
            require(bool(module.selection.isfinite().all()), self, "its selections are not finite")
            rank = ranks[path] = module.selected()
            tensors[f"{path}.down"] = fresh(rank, module.down.shape[1])
            tensors[f"{path}.up"] = torch.zeros(len(module.up), rank)
        return dataclasses.replace(self, ranks=ranks), tensors

    def fold(self, part: nn.Module) -> tuple[LoRA, nn.Module]:
        """LoRA of the ranks that were selected. Where layers cannot have ranks of their own, they get the largest."""
        return lora_of_ranks(self, _selected(part))


def _selected(part: nn.Module) -> dict[str, SelectedRanks]:
    """By path, <tower>.<block>.<site>."""
    return {path: module for path, module in part.named_modules() if isinstance(module, SelectedRanks)}
