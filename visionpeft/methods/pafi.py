"""PaFi: Parameter-Efficient Fine-Tuning without Introducing New Latency (Liao et al., 2023).

https://arxiv.org/abs/2305.16742
"""

from collections.abc import Iterator
from dataclasses import dataclass

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import blocks_of, require
from visionpeft.methods.parts.entries import TrainsEntries
from visionpeft.methods.parts.sparse_delta import (
    SparseCandidate,
    candidates_of,
    highest,
    number_of,
    sparse_placements,
)
from visionpeft.sites import Placement


@dataclass(frozen=True)
class PaFi(TrainsEntries):
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

    choosing = ("density", "entries")

    density: float = 0.005
    entries: dict[str, int] | None = None
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.density <= 1, self, f"density must be above 0 and at most 1, not {self.density}")

    def candidates(self, tower: Tower) -> dict[str, SparseCandidate]:
        """Weights and biases of the linear layers of the blocks."""
        return candidates_of(tower, blocks_of(self, tower), norms=False)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `SparseDelta` at every layer of which entries are chosen."""
        if self.entries is not None:
            return super().place(tower)
        candidates = self.candidates(tower)
        require(
            not any(candidate.values.is_meta for candidate in candidates.values()),
            self,
            "the smallest entries are those of weights, and the model has none yet (device 'meta'); attach it once it "
            "has (to_empty, load_state_dict), or name the entries",
        )
        scores = {name: -candidate.values.detach().abs() for name, candidate in candidates.items()}
        return sparse_placements(tower, candidates, highest(scores, number_of(self.density, candidates)))
