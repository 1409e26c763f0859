"""Raise a Child in Large Language Model (Xu et al., 2021), https://arxiv.org/abs/2109.05687."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from visionpeft.backbones.tower import Tower
from visionpeft.methods.fish_mask import highest_fisher
from visionpeft.methods.parts.base import Method, Squares, require, require_same
from visionpeft.methods.parts.sparse_delta import (
    candidates_of,
    index_tensors,
    indices_by_name,
    sparse_placements,
    united,
)
from visionpeft.sites import Placement


@dataclass(frozen=True)
class ChildTuning(Method):
    """Fine-tuning in which only a "child network" of the backbone gets gradients.

    "F", task-free: every parameter of the backbone and the head is trained; each step of an optimiser draws
    M ~ Bernoulli(share) for every entry and turns its gradient g into M g / share. As in the authors' optimiser, M is
    drawn once for each step, after gradients are accumulated and clipped; here it is one draw for all processes. This
    is a regulariser: all entries change and all are saved, the mask saves nothing.
    "D", task-driven: the child is fixed, the entries with the largest Fisher information, as in `FishMask` and under
    the same conditions; their gradient is not rescaled. Entries outside it do not move, not even by weight decay.
    Mergeable. Trainable on ViT-B/16: F 85,798,656; D share * (L (12 D^2 + 12 D) + 2 D).
    Source: Xu et al., Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning, 2021.

    Args:
        variant: "F" or "D".
        share: share of the entries in the child network; 0.2 to 0.4 for F and 0.1 to 0.3 for D in the paper.
        samples: for D, how many samples are measured, each by a backward pass of its own.
        entries: for D, how many entries of each tensor; found by `allocate`, not to be given.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    variant: Literal["F", "D"] = "F"
    share: float = 0.3
    samples: int = 1024
    entries: dict[str, int] | None = None
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.share <= 1, self, f"share must be above 0 and at most 1, not {self.share}")
        require(self.samples > 0, self, "samples must be a positive integer")

    @property
    def pending(self) -> bool:
        """Whether the child network of D has not been chosen."""
        return self.variant == "D" and self.entries is None

    def trains(self, tower: Tower) -> Iterator[str]:
        """For F, all parameters of the tower."""
        return iter(tower.parameter_names() if self.variant == "F" else ())

    def mask_gradient(self, gradient: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """M g / share."""
        return gradient * torch.empty_like(gradient).bernoulli_(self.share, generator=generator) / self.share

    def place(self, tower: Tower) -> Iterator[Placement]:
        """For D, one `SparseDelta` at every layer of which entries are chosen."""
        if self.variant == "F":
            return iter(())
        candidates = candidates_of(tower, range(tower.depth), norms=True)
        return sparse_placements(tower, candidates, indices_by_name(candidates, self.entries))

    def combine(self, methods, parts, weights):
        """The weighted sum of the changes, with the entries of all."""
        require_same(methods, but=("share", "samples", "entries"))
        if self.variant == "F":
            return self, {}  # trained copies are combined for all methods alike
        entries, tensors = united(parts, weights)
        return dataclasses.replace(self, entries=entries), tensors

    def allocate(self, towers: Sequence[Tower], squares: Squares) -> tuple[Method, dict[str, torch.Tensor]]:
        """For D, choose the entries with the largest sums of squared gradients of single samples."""
        candidates = [candidates_of(tower, range(tower.depth), norms=True) for tower in towers]
        indices = highest_fisher(candidates, self.share, self.samples, squares)
        return dataclasses.replace(self, entries={n: len(i) for n, i in indices.items()}), index_tensors(indices)
