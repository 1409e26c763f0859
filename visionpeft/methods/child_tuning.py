"""Raise a Child in Large Language Model (Xu et al., 2021), https://arxiv.org/abs/2109.05687."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from visionpeft.backbones.tower import Tower
from visionpeft.methods.fish_mask import highest_fisher
from visionpeft.methods.parts.base import Method, require, require_same
from visionpeft.methods.parts.measures import Squares
from visionpeft.methods.parts.sparse_delta import (
    SparseCandidate,
    candidates_of,
    highest,
    index_tensors,
    indices_by_name,
    number_of,
    sparse_placements,
    united,
)
from visionpeft.sites import Placement

MAX_NORM = 1.0  # to which the authors' code clips the gradient of each tensor


@dataclass(frozen=True)
class ChildTuning(Method):
    """Fine-tuning in which only a "child network" of the backbone gets gradients.

    "F", task-free: every parameter of the backbone and the head is trained; each step of an optimiser draws
    M ~ Bernoulli(share) for every entry and turns its gradient g into M g / share. As in the authors' optimiser, M is
    drawn once for each step, after gradients are accumulated and clipped; here it is one draw for all processes. This
    is a regulariser: all entries change and all are saved, the mask saves nothing.
    "D", task-driven: the child is fixed, the entries of the blocks with the largest Fisher information, measured by
    `visionpeft.allocate` before training (the command line does it by itself); their gradient is not rescaled. Entries
    outside it do not move, not even by weight decay. The head, which must not start at zero, is trained whole.
    Mergeable. Trainable on ViT-B/16: F 85,798,656; D share * L (12 D^2 + 13 D) and what is outside the blocks, 744,192.
    Source: Xu et al., Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning, 2021, and
    the authors' code (alibaba/AliceMind, ChildTuning).

    Formula and code of "D": the paper's Fisher information is a sum over samples of squared gradients of single
    samples. The authors' code squares gradients of whole training batches, each tensor's clipped to norm one, with
    dropout acting; and it trains whole what is outside the blocks, embeddings and final norm. `rule="published"` does
    that, with q, k and v as tensors of their own; parameters of the blocks that belong to no linear layer or LayerNorm
    stay frozen.
    `rule="formula"` is the paper's sum, over the blocks and the final norm without key biases, and freezes the rest.

    Args:
        variant: "F" or "D".
        share: share of the entries in the child network; 0.2 to 0.4 for F and 0.1 to 0.3 for D in the paper.
        samples: for D, how many samples are measured: in the batches they come in, or each by a backward pass of its
            own.
        rule: for D, "published" or "formula", see above.
        entries: for D, how many entries of each tensor; found by `allocate`, not to be given.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    written_without = {"rule": "formula"}  # noqa: RUF012  (annotated in Method)

    variant: Literal["F", "D"] = "F"
    share: float = 0.3
    samples: int = 1024
    rule: Literal["published", "formula"] = "published"
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
        """For F, all parameters of the tower; for D as published, those outside its blocks."""
        names = tower.parameter_names() if self.variant == "F" or self.rule == "published" else ()
        inside = {id(p) for block in tower.blocks for p in block.module.parameters() if self.variant == "D"}
        return (name for name in names if id(tower.module.get_parameter(name)) not in inside)

    @property
    def masks_gradients(self) -> bool:
        """Whether gradients are masked while training: F's."""
        return self.variant == "F"

    def mask_gradient(self, gradient: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """M g / share."""
        return gradient * torch.empty_like(gradient).bernoulli_(self.share, generator=generator) / self.share

    def place(self, tower: Tower) -> Iterator[Placement]:
        """For D, one `SparseDelta` at every layer of which entries are chosen."""
        if self.variant == "F":
            return iter(())
        candidates = self._candidates(tower)
        return sparse_placements(tower, candidates, indices_by_name(candidates, self.entries))

    def combine(self, methods, parts, weights):
        """The weighted sum of the changes, with the entries of all."""
        require_same(methods, but=("share", "samples", "entries"))
        if self.variant == "F":
            return self, {}  # trained copies are combined for all methods alike
        entries, tensors = united(parts, weights)
        return dataclasses.replace(self, entries=entries), tensors

    def allocate(self, towers: Sequence[Tower], squares: Squares) -> tuple[Method, dict[str, torch.Tensor]]:
        """For D, choose the entries with the largest sums of squared gradients, in each tower for itself."""
        candidates = [self._candidates(tower) for tower in towers]
        if self.rule == "formula":
            numbers = [number_of(self.share, each) for each in candidates]
            indices = highest_fisher(candidates, numbers, self.samples, squares)
        else:
            every = {name: c for tower in candidates for name, c in tower.items()}
            scores, indices = squares(every, self.samples, False, clip=MAX_NORM, training=True), {}
            for tower in candidates:
                # those above the percentile 1 - share of all entries, as NumPy interpolates it
                total = sum(candidate.values.numel() for candidate in tower.values())
                number = total - math.ceil((1 - self.share) * (total - 1))
                indices |= highest({name: scores[name] for name in tower}, number)
        return dataclasses.replace(self, entries={n: len(i) for n, i in indices.items()}), index_tensors(indices)

    def _candidates(self, tower: Tower) -> dict[str, SparseCandidate]:
        published = self.rule == "published"
        outside = "none" if published else "final_norms"
        return candidates_of(tower, range(tower.depth), norms=True, outside=outside, key_bias=published)
