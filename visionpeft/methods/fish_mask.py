"""FISH Mask: Training Neural Networks with Fixed Sparse Masks (Sung et al., 2021), https://arxiv.org/abs/2111.09839."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require
from visionpeft.methods.parts.entries import TrainsEntries
from visionpeft.methods.parts.measures import Squares
from visionpeft.methods.parts.sparse_delta import SparseCandidate, candidates_of, highest, number_of


@dataclass(frozen=True)
class FishMask(TrainsEntries):
    """Trains the entries of weights, biases and norms with the largest Fisher information on the task.

    The empirical Fisher information of an entry is the mean over samples of (d log p(y|x) / d w)^2, measured by
    `visionpeft.allocate` before training (the command line does it by itself); entries are chosen in each tower
    together. The weight becomes W + D, where D is zero but for those entries. The head is trained whole; it must not
    start at zero, or no gradient reaches the backbone. Mergeable. The saved adapter holds values and indices.
    As in the paper and its code, `density` is the share of all parameters of tower and head, and the head's, which are
    all trained, are counted in it: int(density * (tower + head)) - head entries are chosen. They are chosen among all
    linear layers, patch embeddings and LayerNorms; class token, positions and scales outside of layers are counted and
    stay frozen, where the code could choose entries of them, too. With `among="blocks"`, it is a share of the layers of
    the blocks and the final norm without key biases, the head aside: density * (L (12 D^2 + 12 D) + 2 D).
    Trainable on ViT-B/16 without a head, for 0.5 %: 428,993, or 425,234 among the blocks.
    Source: Sung, Nair, Raffel, Training Neural Networks with Fixed Sparse Masks, 2021, and the authors' code
    (varunnair18/FISH).

    Args:
        density: share of the entries that is trained; the paper uses 0.005.
        among: "model" or "blocks": of what this is a share, and among what entries are chosen. With other `blocks` than
            all, "model" is the layers of these blocks and the head.
        samples: how many samples are measured, each by a backward pass of its own.
        entries: how many entries of each tensor; found by `allocate`, not to be given.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    written_without = {"among": "blocks"}  # noqa: RUF012  (annotated in Method)

    choosing = ("density", "samples", "entries", "among")

    density: float = 0.005
    samples: int = 1024
    entries: dict[str, int] | None = None
    among: Literal["model", "blocks"] = "model"
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

    def combine(self, methods, parts, weights):
        """The weighted sum of the changes, with the entries of all, among the layers of all."""
        combined, tensors = super().combine(methods, parts, weights)
        among = "model" if any(method.among == "model" for method in methods) else self.among
        return dataclasses.replace(combined, among=among), tensors

    def allocate(self, towers: Sequence[Tower], squares: Squares) -> tuple[Method, dict[str, torch.Tensor]]:
        """Choose the entries with the largest sums of squared gradients of single samples."""
        candidates = [self.candidates(tower) for tower in towers]
        numbers = [number_of(self.density, each) for each in candidates]
        if self.among == "model":
            heads = [squares.head_values, *[0] * (len(towers) - 1)]  # a head reads one tower
            numbers = [self._number(*each) for each in zip(towers, candidates, heads, strict=True)]
        return self.with_entries(highest_fisher(candidates, numbers, self.samples, squares))

    def candidates(self, tower: Tower) -> dict[str, SparseCandidate]:
        """What entries are chosen of."""
        model = self.among == "model"
        outside = "all" if model and self._whole(tower) else "final_norms"
        return candidates_of(tower, blocks_of(self, tower), norms=True, outside=outside, key_bias=model)

    def _whole(self, tower: Tower) -> bool:
        return len(blocks_of(self, tower)) == tower.depth

    def _number(self, tower: Tower, candidates: dict[str, SparseCandidate], head: int) -> int:
        """How many entries the budget leaves after a head of so many values, as the authors' code rounds it."""
        values = [tower.module.get_parameter(name) for name in tower.parameter_names()]
        if not self._whole(tower):
            values = [candidate.values for candidate in candidates.values()]
        total = sum(value.numel() for value in values) + head
        number = int(self.density * total) - head
        require(
            number > 0,
            self,
            f"the head has {head:,} values, which are counted in the budget of {int(self.density * total):,}; use a "
            'larger density, or among="blocks", where the head is not counted',
        )
        return number


def highest_fisher(
    candidates: list[dict], numbers: Sequence[int], samples: int, squares: Squares
) -> dict[str, torch.Tensor]:
    """Indices of so many entries of each tower, those with the largest empirical Fisher information."""
    scores = squares({name: c for tower in candidates for name, c in tower.items()}, samples, True)
    indices = {}
    for tower, number in zip(candidates, numbers, strict=True):
        indices |= highest({name: scores[name] for name in tower}, number)
    return indices
