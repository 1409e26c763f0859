"""FISH-DIP: Unified Low-Resource Sequence Labeling by Sample-Aware Dynamic Sparse Finetuning (Das et al., 2023).

https://arxiv.org/abs/2311.03748
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Tower
from visionpeft.methods.fish_mask import FishMask
from visionpeft.methods.parts.base import Measure, Method, require
from visionpeft.methods.parts.layer_delta import LayerDelta
from visionpeft.methods.parts.measures import Squares
from visionpeft.methods.parts.sparse_delta import (
    PARTS,
    SparseCandidate,
    SparseDelta,
    indices_by_name,
    scatter,
    sparse_placements,
)
from visionpeft.methods.parts.trees import tree_of
from visionpeft.sites import Placement
from visionpeft.sites.frozen_layers import sparse_product


class RenewedEntries(SparseDelta):
    """`SparseDelta` beside entries that were trained before and keep their values.

    These are buffers for each part: values, `weight_before` (number,), and flat indices, `weight_before_at` (number,).

    Args:
        layer: a linear layer, a patch convolution or a LayerNorm.
        now: flat indices of the trained entries by part.
        before: flat indices of those that were trained before, none of which is trained now.
    """

    def __init__(self, layer: Layer, now: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]):
        super().__init__(layer, **now)
        for part in PARTS:
            index = before.get(part)
            self.register_buffer(f"{part}_before", None if index is None else torch.zeros(len(index)))
            self.register_buffer(f"{part}_before_at", index)

    def has(self, part: str) -> bool:
        """Whether it changes the weight, or the bias."""
        return getattr(self, part) is not None or getattr(self, f"{part}_before") is not None

    @property
    def precision(self) -> torch.dtype:
        """That of its values."""
        every = (self.weight, self.bias, self.weight_before, self.bias_before)
        return next(values for values in every if values is not None).dtype

    def product(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """D x; of a linear layer, without making D."""
        if self.kind == "linear":
            return sparse_product(x, *self.every("weight"), self.shape, dtype)
        return LayerDelta.product(self, x, dtype)

    def sparse_change(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] | None:
        """Values and flat indices of D, and d, for a linear layer."""
        if self.kind != "linear":
            return None
        values, index = self.every("weight") if self.has("weight") else (None, None)
        return values, index, self.dense("bias") if self.has("bias") else None

    def dense(self, part: str) -> torch.Tensor:
        """The change as a tensor like the weight or bias, zeros included."""
        return scatter(*self.every(part), self.shape[: 1 if part == "bias" else None])

    def every(self, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and flat indices of what is trained now and of what was before."""
        pairs = [(getattr(self, part), getattr(self, f"{part}_index"))]
        pairs += [(getattr(self, f"{part}_before"), getattr(self, f"{part}_before_at"))]
        values, index = zip(*(pair for pair in pairs if pair[0] is not None), strict=True)
        return torch.cat(values), torch.cat(index)

    def folded(self) -> "RenewedEntries":
        """The same change, all entries of which are trained now."""
        one = copy.deepcopy(self)
        for part in PARTS:
            if self.has(part):
                values, index = self.every(part)
                order = index.argsort()
                setattr(one, part, nn.Parameter(values.detach()[order].clone()))
                setattr(one, f"{part}_index", index[order])
            setattr(one, f"{part}_before", None)
            setattr(one, f"{part}_before_at", None)
        return one


class OfHardSamples:
    """Measures squared gradients of the samples with the largest losses, of all that are shown.

    Args:
        squares: measures them.
        number: of samples.
    """

    def __init__(self, squares: Squares, number: int):
        self.squares = squares
        self.number = number
        self.head_values = squares.head_values

    def __call__(self, candidates: Mapping[str, SparseCandidate], samples: int, each: bool) -> dict[str, torch.Tensor]:
        """Sums by name over so many samples; see `adapters.measures.Measures`."""
        return self.squares(candidates, None, each, hardest=self.number)


@dataclass(frozen=True)
class FishDip(FishMask):
    """`FishMask` whose entries are chosen anew during the training, by the samples that are hardest then.

    `visionpeft.allocate` chooses the first entries before training, and `renewals` more stages follow
    (`visionpeft.stages`; the command line does all), each from where the last one ended, with entries of its own. They
    are chosen like those of FishMask, by squared gradients at the weights as they are, but of the `samples` training
    samples with the largest losses alone. Entries that are no longer chosen keep their values and are not trained.
    Each stage has a new optimiser: in the published code, where gradients are masked and the optimiser stays, momentum
    and weight decay go on moving entries that have left. There entries are renewed every 100 steps of one schedule;
    here a stage is as long as the trainer says, with a schedule of its own. The head is trained whole and must not
    start at zero. Mergeable. Saved are all entries that were ever trained, at most (renewals + 1) times as many.
    Trained in each stage on ViT-B/16 without a head: int(.01 * 85,798,656) = 857,986; for a head see FishMask.
    Source: Das, Zhang, Shi, Yin, Zhang, Unified Low-Resource Sequence Labeling by Sample-Aware Dynamic Sparse
    Finetuning, 2023, and the authors' code (psunlpgroup/FISH-DIP), whose 1 % and 25 samples these are; there it is 25
    at most, and a tenth of the number of batches if that is less, but 3 at least.

    Args:
        density: share of the entries that is trained at a time.
        among: as in `FishMask`.
        samples: of how many samples, the hardest of all training samples, gradients are measured.
        renewals: how often entries are chosen anew.
        entries: how many entries of each tensor; found by `allocate`, not to be given.
        before: how many of each were trained before and are no longer; found after a stage, not to be given.
        renewed: how often they have been chosen anew; counted after a stage, not to be given.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    written_without: ClassVar[Mapping[str, object]] = {}
    found: ClassVar[tuple[str, ...]] = ("entries", "before", "renewed")
    choosing: ClassVar[tuple[str, ...]] = (*FishMask.choosing, "renewals", "before", "renewed")
    rewinds = False

    density: float = 0.01
    samples: int = 25
    renewals: int = 4
    before: dict[str, int] | None = None
    renewed: int = 0

    def __post_init__(self):
        super().__post_init__()
        require(self.renewals > 0, self, "renewals must be a positive integer; without any it is FishMask")
        require(0 <= self.renewed <= self.renewals, self, f"renewed must be from 0 to {self.renewals}")

    @property
    def stages_after(self) -> int:
        """As many as there are renewals to come."""
        return self.renewals - self.renewed

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `RenewedEntries` at every layer of which entries are or were trained; first, one `SparseDelta`."""
        if not self.before:
            yield from super().place(tower)
            return
        candidates = self.candidates(tower)
        now, before = (indices_by_name(candidates, numbers) for numbers in (self.entries, self.before))
        for placement in sparse_placements(tower, candidates, now | before):
            path = ".".join(str(each) for each in (tower.name, placement.block, placement.site) if each is not None)
            parts = [
                {part: indices[f"{path}.{part}"] for part in PARTS if f"{path}.{part}" in indices}
                for indices in (now, before)
            ]
            layer = next(candidates[f"{path}.{part}"].layer for part in PARTS if f"{path}.{part}" in candidates)
            yield dataclasses.replace(placement, module=RenewedEntries(layer, *parts))

    def allocate(self, towers: Sequence[Tower], squares: Squares) -> tuple[Method, dict[str, torch.Tensor]]:
        """Choose the entries with the largest sums of squared gradients of the hardest samples."""
        return super().allocate(towers, OfHardSamples(squares, self.samples))

    def next_stage(
        self,
        towers: Sequence[Tower],
        part: nn.Module,
        start: Mapping[str, torch.Tensor],
        trained: Mapping[str, torch.Tensor],
        measure: Measure,
    ) -> tuple[Method, dict[str, torch.Tensor]]:
        """Choose again; what has been trained keeps its values."""
        changes = {
            f"{path}.{each}": module.dense(each).flatten()
            for path, module in part.named_modules()
            if isinstance(module, SparseDelta)
            for each in PARTS
            if module.has(each)
        }
        following, chosen = self.allocate(towers, measure.squares)
        now = {name.removesuffix("_index"): index.long().cpu() for name, index in chosen.items()}
        tensors, before = dict(chosen), {}
        for name, index in now.items():
            tensors[name] = changes[name].cpu()[index] if name in changes else torch.zeros(len(index))
        for name, change in changes.items():
            left = change.detach().cpu().clone()
            left[now.get(name, [])] = 0
            if left.any():
                tensors[f"{name}_before_at"] = left.nonzero().flatten().to(torch.int32)
                tensors[f"{name}_before"] = left[left != 0]
                before[name] = len(tensors[f"{name}_before"])
        return dataclasses.replace(following, before=before, renewed=self.renewed + 1), tensors

    def fold(self, part: nn.Module) -> tuple[Method, nn.Module]:
        """All entries that were ever trained, as one change."""
        modules = {path: module for path, module in part.named_modules() if isinstance(module, RenewedEntries)}
        if modules:
            others = {path: module for path, module in part.named_modules() if type(module) is SparseDelta}
            part = tree_of(others | {path: module.folded() for path, module in modules.items()})
        return dataclasses.replace(super().fold(part)[0], before=None), part
