"""DyLoRA: Parameter-Efficient Tuning using Dynamic Search-Free Low-Rank Adaptation (Valipour et al., 2023).

https://arxiv.org/abs/2210.07558
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.lora import LowRank
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.seeded import raw_numbers
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.sites import Placement


class NestedLowRank(LowRank):
    """y + s(b) up[:, :b] down[:b] dropout(x): `LowRank` cut to its first b ranks, s(b) = alpha / b or 1.

    While training b is that of the step, otherwise the one to be used. down (rank, in) is Kaiming-uniform with
    a = sqrt(5), up (out, rank) is zero: no change at the start. Buffers (rank,) have s(b) for the first b ranks and
    zero for the others: `drawn` of the step, saved so that a run goes on as it would have, and `kept` of the rank to be
    used.
    """

    output_side = ("up",)

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float | None, dropout: float):
        nn.Module.__init__(self)  # A and B are no parameters here
        self.down = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5)))
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        self.alpha = alpha
        self.scaling = 1.0
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("drawn", self.share(rank))
        self.register_buffer("kept", self.share(rank))

    def share(self, rank: int) -> torch.Tensor:
        """s(b) for the first b = `rank` ranks, zero for the others."""
        share = torch.zeros(len(self.down), dtype=self.down.dtype, device=self.down.device)
        share[:rank] = 1.0 if self.alpha is None else self.alpha / rank
        return share

    def draw(self, rank: int) -> None:
        """Train the first `rank` ranks in the next step."""
        self.drawn.copy_(self.share(rank))

    def use(self, rank: int) -> None:
        """Use the first `rank` ranks outside of training.

        Raises:
            ValueError: if there are not so many.
        """
        if not 0 < rank <= len(self.down):
            raise ValueError(f"there are {len(self.down)} ranks, so {rank} cannot be used")
        self.kept.copy_(self.share(rank))

    @property
    def A(self) -> torch.Tensor:
        """down, scaled, with zeros after its first b rows (rank, in)."""
        return (self.drawn if self.training else self.kept)[:, None] * self.down

    @property
    def B(self) -> torch.Tensor:
        """up (out, rank)."""
        return self.up


@dataclass(frozen=True)
class DyLoRA(Method):
    """LoRA trained at all ranks at once: every step trains the first b ranks, W + (alpha / b) B[:, :b] A[:b].

    b is drawn for each step, the same for all layers and processes, uniformly from `lowest` to `rank`, and follows from
    seed and step. After training the first `used` ranks act; the file has all of them, and `module.use(b)` of every
    `NestedLowRank` of an adapter chooses anew, with the scale of that rank, so that one training serves all ranks. What
    is merged is taken out again exactly, whatever has been chosen since, where published code leaves a remainder.
    The tasks do this by themselves; a training loop of your own must call `after_step(model, step, total_steps)`
    between `optimizer.step()` and `zero_grad()`. B is zero: no change at the start. Mergeable. The paper's variant that
    trains rank b alone ("frozen") is not built.
    Trainable: sum over target layers of rank * (in + out), as LoRA; 294,912 on ViT-B/16 for rank 8 on q and v.
    Source: Valipour et al., DyLoRA, 2023; that b is drawn uniformly is recalled, not read.

    Args:
        rank: the highest rank.
        lowest: the lowest rank that is trained.
        used: rank that acts outside of training; None for the highest.
        alpha: numerator of the scale alpha / b; None for a scale of 1 at all ranks.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        dropout: dropout on the input of A.
        seed: seed of the draws.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    rank: int = 8
    lowest: int = 1
    used: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    seed: int = 0
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.rank > 0, self, "rank must be a positive integer")
        require(0 < self.lowest <= self.rank, self, f"lowest must be from 1 to rank, {self.rank}, not {self.lowest}")
        used = self.rank if self.used is None else self.used
        require(0 < used <= self.rank, self, f"used must be from 1 to rank, {self.rank}, not {self.used}")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        require(self.seed >= 0, self, "seed must be an integer that is not negative")
        require_targets(self)

    def rank_of_step(self, step: int) -> int:
        """The rank b that is trained after this many steps."""
        return self.lowest + int(raw_numbers(1, self.seed, step)[0]) % (self.rank - self.lowest + 1)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `NestedLowRank` at every target layer of the chosen blocks."""
        for index, layer in target_layers(self, tower):
            module = NestedLowRank(layer.in_features, layer.out_features, self.rank, self.alpha, self.dropout)
            module.draw(self.rank_of_step(0))
            module.use(self.rank if self.used is None else self.used)
            yield Placement(tower.name, index, layer.site, module)

    def after_step(self, part: nn.Module, step: int, total_steps: int) -> None:
        """Draw the rank of the next step."""
        rank = self.rank_of_step(step)
        for module in part.modules():
            if isinstance(module, NestedLowRank):
                module.draw(rank)
