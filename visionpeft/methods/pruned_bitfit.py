"""U-BitFit and S-BitFit: Neural Architecture Search for Parameter-Efficient Fine-tuning (Lawton et al., 2023).

https://arxiv.org/abs/2305.16597
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.base import Measure, Method, require
from visionpeft.methods.parts.entries import TrainsEntries
from visionpeft.methods.parts.sparse_delta import (
    SparseCandidate,
    SparseDelta,
    candidates_of,
    highest,
    sparse_placements,
)
from visionpeft.sites import Placement


@dataclass(frozen=True)
class PrunedBitFit(TrainsEntries):
    """Trains the biases without which the loss would change most, found by training all of them and pruning.

    `rounds` + 1 stages (`visionpeft.stages`; the command line does all). The first trains a shift d of every bias, zero
    at the start. After each stage but the last the score of an entry is the sum over training samples of |d g|, where g
    is the gradient of the loss: to first order, how much the loss of a sample would change without it. The entries of
    the highest scores stay (U-BitFit) or, with `structured`, the vectors of the highest sums of scores (S-BitFit); what
    stays goes back to zero and is trained again. After round i it is a share density^(i / rounds). Mergeable.
    Trained in the end: round(density * pool) entries, or all of round(density * vectors) vectors. The pool on ViT-B/16
    is that of `BitFit(key_bias=False)`, 93,696 in 86 vectors; 9,370 for a tenth.
    Source: Lawton, Kumar, Thattai, Galstyan, Ver Steeg, Neural Architecture Search for Parameter-Efficient Fine-tuning
    of Large Pre-trained Language Models, 2023, whose code is not published; the exact form of the score and of the
    rounds is recalled, not checked.

    Args:
        density: share of the entries, or of the vectors, that stays.
        structured: prune whole vectors, and not single entries.
        rounds: how often they are pruned.
        samples: how many training samples are measured, each by a backward pass of its own.
        pruned: how often they have been pruned; found after a stage, not to be given.
        entries: how many entries of each bias; found after a stage, not to be given.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    found: ClassVar[tuple[str, ...]] = ("entries", "pruned")
    choosing = ("density", "samples", "entries", "structured", "rounds", "pruned")

    density: float = 0.1
    structured: bool = False
    rounds: int = 1
    samples: int = 1024
    pruned: int = 0
    entries: dict[str, int] | None = None
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.density <= 1, self, f"density must be above 0 and at most 1, not {self.density}")
        require(self.rounds > 0, self, "rounds must be a positive integer")
        require(0 <= self.pruned <= self.rounds, self, f"pruned must be from 0 to {self.rounds}")
        require(self.samples > 0, self, "samples must be a positive integer")

    @property
    def stages_after(self) -> int:
        """As many as there are rounds to come."""
        return max(0, self.rounds - self.pruned)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `SparseDelta` at every layer of whose bias entries are trained."""
        if self.entries is not None:
            return super().place(tower)
        biases = self.candidates(tower)
        every = {name: torch.arange(bias.values.numel(), dtype=torch.int32) for name, bias in biases.items()}
        return sparse_placements(tower, biases, every)

    def candidates(self, tower: Tower) -> dict[str, SparseCandidate]:
        """All biases but those of keys."""
        every = candidates_of(tower, range(tower.depth), norms=True, outside="all")
        return {name: candidate for name, candidate in every.items() if candidate.part == "bias"}

    def next_stage(
        self,
        towers: Sequence[Tower],
        part: nn.Module,
        start: Mapping[str, torch.Tensor],
        trained: Mapping[str, torch.Tensor],
        measure: Measure,
    ) -> tuple[Method, dict[str, torch.Tensor]]:
        """Keep the entries, or vectors, of the highest scores."""
        modules = {f"{path}.bias": module for path, module in part.named_modules() if isinstance(module, SparseDelta)}
        scores = {name: torch.zeros_like(module.bias, dtype=torch.float64) for name, module in modules.items()}

        def see(gradients: tuple[torch.Tensor, ...]) -> None:
            for (name, module), gradient in zip(modules.items(), gradients, strict=True):
                scores[name] += (module.bias.detach() * gradient).double().abs()

        measure([module.bias for module in modules.values()], self.samples, see)
        require(
            all(each.isfinite().all() for each in scores.values()) and any(each.any() for each in scores.values()),
            self,
            "the scores of its biases are all zero, or not finite: a stage has moved none to choose by",
        )
        pruned = self.pruned + 1
        share = self.density ** (pruned / self.rounds)
        pools = [self.candidates(tower).values() for tower in towers]
        if self.structured:
            number = max(1, round(share * sum(len(pool) for pool in pools)))
            best = sorted(scores, key=lambda name: scores[name].sum().item(), reverse=True)[:number]
            kept = {name: torch.arange(len(scores[name])) for name in scores if name in best}
        else:
            total = sum(bias.values.numel() for pool in pools for bias in pool)
            kept = highest(scores, max(1, round(share * total)))
        # positions among the entries of this stage -> positions in the biases
        indices = {name: modules[name].bias_index[index.long()] for name, index in kept.items()}
        zeros = {name: torch.zeros(len(index), dtype=modules[name].bias.dtype) for name, index in indices.items()}
        following, tensors = self.with_entries(indices)
        return dataclasses.replace(following, pruned=pruned), tensors | zeros
