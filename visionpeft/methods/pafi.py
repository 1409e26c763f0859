"""PaFi: Parameter-Efficient Fine-Tuning without Introducing New Latency (Liao et al., 2023).

https://arxiv.org/abs/2305.16742
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require, require_same
from visionpeft.methods.parts.sparse_delta import (
    candidates_of,
    entries_of,
    highest,
    indices_by_name,
    number_of,
    sparse_placements,
    united,
)
from visionpeft.sites import Placement


@dataclass(frozen=True)
class PaFi(Method):
    """Trains the entries of weights and biases with the smallest magnitude; no data are needed to find them.

    The weight becomes W + D, where D is zero but for those entries; they are the same for every task. Chosen in each
    tower among the matrices of all blocks together and their biases, without norms, embeddings and the key bias.
    Mergeable. The saved adapter holds the values and indices of the entries.
    Trainable: density * L (12 D^2 + 8 D) with an MLP of width 4 D; 425,042 on ViT-B/16 for 0.5 %.
    Source: Liao, Meng, Monz, Parameter-Efficient Fine-Tuning without Introducing New Latency, 2023.

    Args:
        density: share of the entries that is trained; the paper uses 0.001 to 0.005.
        entries: how many entries of each tensor; written when an adapter is saved, not to be given.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    density: float = 0.005
    entries: dict[str, int] | None = None
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.density <= 1, self, f"density must be above 0 and at most 1, not {self.density}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `SparseDelta` at every layer of which entries are chosen."""
        candidates = candidates_of(tower, blocks_of(self, tower), norms=False)
        if self.entries is None:
            scores = {name: -candidate.values.detach().abs() for name, candidate in candidates.items()}
            indices = highest(scores, number_of(self.density, candidates))
        else:
            indices = indices_by_name(candidates, self.entries)
        return sparse_placements(tower, candidates, indices)

    def combine(self, methods, parts, weights):
        """The weighted sum of the changes, with the entries of all."""
        require_same(methods, but=("density", "entries"))
        entries, tensors = united(parts, weights)
        return dataclasses.replace(self, entries=entries), tensors

    def fold(self, part: nn.Module) -> tuple["Method", nn.Module]:
        """With the numbers of entries, which another precision of the backbone could count otherwise."""
        return dataclasses.replace(self, entries=entries_of(part)), part
