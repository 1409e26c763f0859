"""Methods that train single entries of weights and biases, and find them in the weights, in data or by a training."""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.base import Method, require_same
from visionpeft.methods.parts.sparse_delta import (
    SparseCandidate,
    entries_of,
    index_tensors,
    indices_by_name,
    sparse_placements,
    united,
)
from visionpeft.sites import Placement


class TrainsEntries(Method):
    """Base of methods whose change of weights and biases is zero but for some entries.

    A subclass is a dataclass with the field `entries`, how many entries of each tensor, None until they are found.
    """

    # Fields that decide only what is chosen, so that adapters that differ in them can be combined.
    choosing: ClassVar[tuple[str, ...]] = ("samples", "entries")

    @abstractmethod
    def candidates(self, tower: Tower) -> dict[str, SparseCandidate]:
        """The weights and biases of which entries can be trained, by name."""

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `SparseDelta` at every layer of which entries are chosen."""
        candidates = self.candidates(tower)
        return sparse_placements(tower, candidates, indices_by_name(candidates, self.entries))

    def combine(self, methods, parts, weights):
        """The weighted sum of the changes, with the entries of all."""
        require_same(methods, but=self.choosing)
        entries, tensors = united(parts, weights)
        return dataclasses.replace(self, entries=entries), tensors

    def fold(self, part: nn.Module) -> tuple[Method, nn.Module]:
        """With the numbers of entries, which another precision of the backbone could count otherwise."""
        return dataclasses.replace(self, entries=entries_of(part)), part

    def with_entries(self, indices: Mapping[str, torch.Tensor]) -> tuple[Method, dict[str, torch.Tensor]]:
        """What `allocate` or `next_stage` answers with once it knows the flat indices of the entries."""
        return dataclasses.replace(self, entries={n: len(i) for n, i in indices.items()}), index_tensors(indices)


def highest_of_rows(score: torch.Tensor, number: int) -> torch.Tensor:
    """Flat indices, ascending, of the entries with the highest scores of every row, as many of each."""
    rows = score.flatten(1)
    first = torch.arange(len(rows), device=rows.device)[:, None] * rows.shape[1]
    chosen = rows.topk(number, dim=1, sorted=False).indices
    return (first + chosen).flatten().sort().values.to(torch.int32)


def names_of(tower: Tower, candidates: Mapping[str, SparseCandidate]) -> dict[str, str]:
    """The names in the tower of the parameters that hold the candidates."""
    names = {id(tower.module.get_parameter(name)): name for name in tower.parameter_names()}
    return {key: names[id(candidate.parameter)] for key, candidate in candidates.items()}


def moved(
    tower: Tower, candidates: Mapping[str, SparseCandidate], trained: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """By how much trained copies of parameters differ from the backbone's: |w1 - w0| of each candidate."""
    changes = {}
    for key, name in names_of(tower, candidates).items():
        after = candidates[key].rows_of(trained[f"{tower.path}.{name}" if tower.path else name].detach())
        changes[key] = (after - candidates[key].values.detach().to(after)).abs()
    return changes
