"""SoRA: Sparse Low-rank Adaptation of Pre-trained Language Models (Ding et al., 2023), https://arxiv.org/abs/2311.11696."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Tower
from visionpeft.methods.adalora import lora_of_ranks
from visionpeft.methods.lora import LoRA, LowRank
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.sites import Placement


class GatedRanks(LowRank):
    """y + scaling * up diag(gate) down dropout(x): `LowRank` with A = diag(gate) down and B = up.

    down (rank, in) is Kaiming-uniform with a = sqrt(5), gate (rank,) is N(0, 1), up (out, rank) zero: no change.
    """

    output_side = ("up",)

    def __init__(self, layer: Layer, rank: int, scaling: float, dropout: float):
        nn.Module.__init__(self)  # A and B are no parameters here
        self.down = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, layer.in_features), a=math.sqrt(5)))
        self.gate = nn.Parameter(torch.randn(rank))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))
        self.target = layer.target
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)

    @property
    def A(self) -> torch.Tensor:
        """diag(gate) down (rank, in)."""
        return self.gate[:, None] * self.down

    @property
    def B(self) -> torch.Tensor:
        """up (out, rank)."""
        return self.up

    @torch.no_grad()
    def shrink(self, threshold: float) -> None:
        """gate <- sign(gate) max(|gate| - threshold, 0)."""
        self.gate.copy_(self.gate.sign() * (self.gate.abs() - threshold).clamp_min(0))

    def acting(self) -> torch.Tensor:
        """Which ranks have a gate that is not zero: (rank,)."""
        return self.gate != 0

    def low_rank(self, rank: int) -> LowRank:
        """The same change with a scale of 1 and this rank, not below the number of gates that are not zero."""
        chosen = (~self.acting()).to(torch.uint8).argsort(stable=True)[:rank].sort().values
        change = LowRank(self.down.shape[1], len(self.up), rank, 1.0, self.dropout.p).to(self.up)
        change.A.data = self.scaling * self.A.detach()[chosen]
        change.B.data = self.up.detach()[:, chosen].contiguous()
        return change


@dataclass(frozen=True)
class SoRA(Method):
    """LoRA with a gate for each rank that is pulled to zero after every step: W + (alpha / rank) B diag(g) A.

    After each step g <- sign(g) max(|g| - threshold, 0), the step of a proximal gradient method for an L1 penalty, so
    that ranks fall away one by one, in each layer as many as the data allow. The published code writes the threshold as
    three lines in place, of which the last sets to zero what the first two have shrunk below it: gates up to twice the
    threshold vanish at once. Here a gate of 1.5 thresholds becomes one of .5. The threshold is not multiplied by the
    learning rate, as in the published configuration. Gates start N(0, 1), as in the published code; B is zero: no
    change at the start.
    The tasks do this by themselves; a training loop of your own must call `after_step(model, step, total_steps)`
    between `optimizer.step()` and `zero_grad()`. `save` writes the ranks whose gates are not zero as `LoRA`, without
    the gates; `export_peft` likewise. Mergeable.
    Trainable: sum over target layers of rank * (in + out + 1); 295,104 on ViT-B/16 for rank 8 on q and v.
    Source: Ding et al., Sparse Low-rank Adaptation of Pre-trained Language Models, 2023.

    Args:
        rank: rank of every layer at the start.
        alpha: numerator of the scale alpha / rank, which stays while ranks fall away; None for a scale of 1.
        threshold: how far gates are pulled towards zero in each step.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        dropout: dropout on the input of A.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    rank: int = 8
    alpha: float | None = 16.0
    threshold: float = 3e-4
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.rank > 0, self, "rank must be a positive integer")
        require(self.threshold >= 0, self, f"threshold must not be negative, but is {self.threshold}")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        require_targets(self)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `GatedRanks` at every target layer of the chosen blocks."""
        scaling = 1.0 if self.alpha is None else self.alpha / self.rank
        for index, layer in target_layers(self, tower):
            module = GatedRanks(layer, self.rank, scaling, self.dropout)
            yield Placement(tower.name, index, layer.site, module)

    def after_step(self, part: nn.Module, step: int, total_steps: int) -> None:
        """Pull every gate towards zero."""
        for layer in _gated(part).values():
            layer.shrink(self.threshold)

    def fold(self, part: nn.Module) -> tuple[LoRA, nn.Module]:
        """LoRA of the ranks that act. Where layers cannot have ranks of their own, they get the largest of them."""
        return lora_of_ranks(self, _gated(part))


def _gated(part: nn.Module) -> dict[str, GatedRanks]:
    """By path, <tower>.<block>.<site>."""
    return {path: module for path, module in part.named_modules() if isinstance(module, GatedRanks)}
