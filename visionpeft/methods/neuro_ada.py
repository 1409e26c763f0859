"""NeuroAda: Activating Each Neuron's Potential for Parameter-Efficient Fine-Tuning (Zhang et al., 2025).

https://arxiv.org/abs/2510.18940
"""

from collections.abc import Iterator
from dataclasses import dataclass

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import blocks_of, require
from visionpeft.methods.parts.entries import TrainsEntries, highest_of_rows
from visionpeft.methods.parts.sparse_delta import SparseCandidate, candidates_of, sparse_placements
from visionpeft.sites import Placement


@dataclass(frozen=True)
class NeuroAda(TrainsEntries):
    """Trains the largest weights of every neuron: for each row of each matrix the k inputs with the largest |W|.

    The weight becomes W + D, where D (out, in) has k entries in every row and starts at zero, trained beside the frozen
    W, as in the authors' code; no data are needed to find them, and they are the same for every task. Acts on q k v
    proj fc1 fc2 of all blocks, the rows of q, k and v being neurons of their own; biases, norms and embeddings are
    frozen. `PaFi` is its opposite: the smallest magnitudes, of all matrices together. Mergeable. The saved adapter
    holds the values and indices of the entries.
    Trainable: k times the rows of the matrices, k L 9 D with an MLP of width 4 D; 82,944 on ViT-B/16 for k = 1.
    Source: Zhang et al., NeuroAda: Activating Each Neuron's Potential for Parameter-Efficient Fine-Tuning, 2025, and
    the authors' code, which is for language models: AdamW, k = 1 with a rate of 8e-3 to 9e-3, or 20 with 7e-4 to 3e-3.

    Args:
        per_row: trained entries k of each row.
        entries: how many entries of each tensor; written when an adapter is saved, not to be given.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    choosing = ("per_row", "entries")

    per_row: int = 1
    entries: dict[str, int] | None = None
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.per_row > 0, self, "per_row must be a positive integer")

    def candidates(self, tower: Tower) -> dict[str, SparseCandidate]:
        """The matrices of the blocks."""
        found = candidates_of(tower, blocks_of(self, tower), norms=False, outside="none")
        return {name: candidate for name, candidate in found.items() if candidate.part == "weight"}

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `SparseDelta` at every matrix."""
        if self.entries is not None:
            return super().place(tower)
        candidates = self.candidates(tower)
        for name, candidate in candidates.items():
            columns = candidate.layer.in_features
            require(self.per_row <= columns, self, f"rows of {name} have {columns} entries, not {self.per_row}")
        indices = {
            name: highest_of_rows(candidate.values.detach().abs(), self.per_row)
            for name, candidate in candidates.items()
        }
        return sparse_placements(tower, candidates, indices)
