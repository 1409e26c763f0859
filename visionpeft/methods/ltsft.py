"""LT-SFT: Composable Sparse Fine-Tuning for Cross-Lingual Transfer (Ansell et al., 2022).

https://arxiv.org/abs/2110.07560
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.base import Measure, Method, require
from visionpeft.methods.parts.entries import TrainsEntries, moved, names_of
from visionpeft.methods.parts.sparse_delta import SparseCandidate, candidates_of, highest
from visionpeft.sites import Placement


@dataclass(frozen=True)
class LTSFT(TrainsEntries):
    """Trains the entries of weights and biases that full fine-tuning moves most, from the start again.

    Two stages (`visionpeft.stages`; the command line does both). In the first, all weights and biases of the layers,
    norms included, are trained from the backbone's w0 to w1. Then the K entries of largest |w1 - w0| are chosen among
    all of them together, and everything, the head as well, goes back to where it began. In the second the weight is
    w0 + D, where D is zero but for those entries. Changes of several tasks add up (`visionpeft.combine` with weights
    of 1), whatever their entries. Mergeable. The first stage costs a full fine-tuning, the saved adapter K values.
    K = round(density * parameters of the towers): 428,993 of 85,798,656 on ViT-B/16 for 0.5 %. Counted, but not chosen
    are class token and position embeddings, which stay frozen, as embeddings may in the paper, and key biases, which
    add the same to all scores of a query and have no gradient.
    Source: Ansell, Ponti, Korhonen, Vulic, Composable Sparse Fine-Tuning for Cross-Lingual Transfer, 2022, and the
    authors' code (cambridgeltl/composable-sft), which has one round by default, as is done here. Where several entries
    are at its threshold it takes all of them; here it is K. Its L1 penalty, zero by default, is not part of this.

    Args:
        density: share of the parameters that the second stage trains.
        entries: how many entries of each tensor; found after the first stage, not to be given.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    choosing = ("density", "entries")

    density: float = 0.005
    entries: dict[str, int] | None = None
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.density <= 1, self, f"density must be above 0 and at most 1, not {self.density}")

    @property
    def stages_after(self) -> int:
        """One, until the entries are chosen."""
        return 1 if self.entries is None else 0

    def trains(self, tower: Tower) -> Iterator[str]:
        """In the first stage, whatever has entries to choose."""
        if self.entries is None:
            yield from dict.fromkeys(names_of(tower, self.candidates(tower)).values())

    def candidates(self, tower: Tower) -> dict[str, SparseCandidate]:
        """Weights and biases of all layers, norms included."""
        return candidates_of(tower, range(tower.depth), norms=True, outside="all")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """In the second stage, one `SparseDelta` at every layer of which entries are chosen."""
        return iter(()) if self.entries is None else super().place(tower)

    def next_stage(
        self,
        towers: Sequence[Tower],
        part: nn.Module,
        start: Mapping[str, torch.Tensor],
        trained: Mapping[str, torch.Tensor],
        measure: Measure,
    ) -> tuple[Method, dict[str, torch.Tensor]]:
        """Choose the entries that have moved most."""
        changes, total = {}, 0
        for tower in towers:
            total += sum(tower.module.get_parameter(name).numel() for name in tower.parameter_names())
            changes |= moved(tower, self.candidates(tower), trained)
        require(any(each.any() for each in changes.values()), self, "its first stage has moved no weight to choose by")
        return self.with_entries(highest(changes, max(1, round(self.density * total))))
