"""FISH Mask: Training Neural Networks with Fixed Sparse Masks (Sung et al., 2021), https://arxiv.org/abs/2111.09839."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, Squares, blocks_of, require, require_same
from visionpeft.methods.parts.sparse_delta import (
    candidates_of,
    highest,
    index_tensors,
    indices_by_name,
    number_of,
    sparse_placements,
    united,
)
from visionpeft.sites import Placement


@dataclass(frozen=True)
class FishMask(Method):
    """Trains the entries of weights, biases and norms with the largest Fisher information on the task.

    The empirical Fisher information of an entry is the mean over samples of (d log p(y|x) / d w)^2, measured by
    `visionpeft.allocate` before training (the command line does it by itself); entries are chosen in each tower
    together. The weight becomes W + D, where D is zero but for those entries. The head is trained whole; it must not
    start at zero, or no gradient reaches the backbone. Mergeable. The saved adapter holds values and indices.
    Trainable: density * (L (12 D^2 + 12 D) + 2 D) with an MLP of width 4 D; 425,234 on ViT-B/16 for 0.5 %.
    Source: Sung, Nair, Raffel, Training Neural Networks with Fixed Sparse Masks, 2021.

    Args:
        density: share of the entries that is trained; the paper uses 0.005.
        samples: how many samples are measured, each by a backward pass of its own.
        entries: how many entries of each tensor; found by `allocate`, not to be given.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    density: float = 0.005
    samples: int = 1024
    entries: dict[str, int] | None = None
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.density <= 1, self, f"density must be above 0 and at most 1, not {self.density}")
        require(self.samples > 0, self, "samples must be a positive integer")

    @property
    def pending(self) -> bool:
        """Whether the Fisher information has not been measured."""
        return self.entries is None

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `SparseDelta` at every layer of which entries are chosen."""
        candidates = candidates_of(tower, blocks_of(self, tower), norms=True)
        return sparse_placements(tower, candidates, indices_by_name(candidates, self.entries))

    def combine(self, methods, parts, weights):
        """The weighted sum of the changes, with the entries of all."""
        require_same(methods, but=("density", "samples", "entries"))
        entries, tensors = united(parts, weights)
        return dataclasses.replace(self, entries=entries), tensors

    def allocate(self, towers: Sequence[Tower], squares: Squares) -> tuple[Method, dict[str, torch.Tensor]]:
        """Choose the entries with the largest sums of squared gradients of single samples."""
        candidates = [candidates_of(tower, blocks_of(self, tower), norms=True) for tower in towers]
        indices = highest_fisher(candidates, self.density, self.samples, squares)
        return dataclasses.replace(self, entries={n: len(i) for n, i in indices.items()}), index_tensors(indices)


def highest_fisher(candidates: list[dict], density: float, samples: int, squares: Squares) -> dict[str, torch.Tensor]:
    """Indices of this share of the entries of each tower, those with the largest empirical Fisher information."""
    scores = squares({name: c for tower in candidates for name, c in tower.items()}, samples, True)
    indices = {}
    for tower in candidates:
        indices |= highest({name: scores[name] for name in tower}, number_of(density, tower))
    return indices
