"""Parameter-Efficient Transfer Learning with Diff Pruning (Guo et al., 2021), https://arxiv.org/abs/2012.07463."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.base import Measure, Method, require
from visionpeft.methods.parts.entries import TrainsEntries
from visionpeft.methods.parts.layer_delta import LayerDelta
from visionpeft.methods.parts.sparse_delta import PARTS, SparseCandidate, candidates_of, highest
from visionpeft.sites import Placement

STRETCH = 1.5  # gates are stretched to (-1.5, 1.5) before they are cut to [0, 1]
LEAST = 1e-4  # of the uniform numbers that are drawn, and of their distance to 1
OPEN = 5.0  # logits of gates at the start


def hard_concrete(logits: torch.Tensor, drawn: bool) -> torch.Tensor:
    """Gates in [0, 1], many of them exactly 0 or 1: min(1, max(0, 3 s - 1.5)).

    s = sigmoid(log u - log(1 - u) + logit) with u uniform in [1e-4, 1 - 1e-4] if drawn, else s = sigmoid(logit). Of
    drawn ones, sigmoid(logit - log 5) are 1 and sigmoid(-logit) are 0, as far as u reaches.
    """
    if drawn:
        uniform = torch.rand_like(logits).clamp(LEAST, 1 - LEAST)
        logits = logits + uniform.logit()
    return (2 * STRETCH * logits.sigmoid() - STRETCH).clamp(0, 1)


class GatedDelta(LayerDelta):
    """A layer whose weight is W + z w and whose bias is b + z w, with trained w and a gate z for every entry.

    w (out, in) is zero, the logits of its gates (out, in) are 5; with `structured`, z is multiplied by one more gate
    for the weight, and for the bias. In training gates are drawn, once for all samples of a pass; in evaluation they
    are not (`hard_concrete`).
    """

    output_side = tuple(f"{part}_{kind}" for part in PARTS for kind in ("gate", "group"))

    def __init__(self, layer: Layer, parts: Sequence[str], structured: bool):
        super().__init__(layer)
        for part in PARTS:
            shape = self.shape if part == "weight" else self.shape[:1]
            there = part in parts
            self.register_parameter(part, nn.Parameter(torch.zeros(shape)) if there else None)
            self.register_parameter(f"{part}_gate", nn.Parameter(torch.full(shape, OPEN)) if there else None)
            group = there and structured
            self.register_parameter(f"{part}_group", nn.Parameter(torch.full((1,), OPEN)) if group else None)

    def dense(self, part: str) -> torch.Tensor:
        """z w with gates that are not drawn."""
        return self._gated(part, drawn=False)

    def acting(self, part: str) -> torch.Tensor:
        """z w, with drawn gates in training."""
        return self._gated(part, drawn=self.training)

    def logits(self) -> list[torch.Tensor]:
        """Of all gates, by tensors."""
        return [getattr(self, name) for name in self.output_side if getattr(self, name) is not None]

    def _gated(self, part: str, drawn: bool) -> torch.Tensor:
        gate, group = (getattr(self, f"{part}_{kind}") for kind in ("gate", "group"))
        change = hard_concrete(gate, drawn) * getattr(self, part)
        return change if group is None else hard_concrete(group, drawn) * change


@dataclass(frozen=True)
class DiffPruning(TrainsEntries):
    """Trains a change of every weight and a gate for it that is pulled shut, and goes on with the largest that is left.

    Two stages (`visionpeft.stages`; the command line does both). In the first, weights and biases of all layers, norms
    included, are w0 + z w. z is hard concrete: with u uniform in [1e-4, 1 - 1e-4] drawn for every entry and step,
    s = sigmoid(log u - log(1 - u) + a) and z = min(1, max(0, 3 s - 1.5)). w starts at zero and a at 5, where 97 of 100
    gates are exactly 1. The loss gets `penalty_weight` times the sum of sigmoid(a), the expected number of gates that
    are not zero. With `structured` (S-Diff, otherwise U-Diff), z is multiplied by one more gate of this kind for each
    weight and each bias, which is in the penalty as one number. Then the K entries of largest |z w| are chosen among
    all, and trained further from z w with the head, without gates; the others go back to w0. Here gates that choose, or
    act in evaluation, are those with s = sigmoid(a); the published code draws once for either, and goes on from w.
    Gates need their own learning rate: 0.1 in the published code, which never lowers it; there its scheduler is made
    and not used. Here it is `--model.optimisation.lora_plus` times the rate of w, and falls with it; left at 1, gates
    hardly move, and the first stage is full fine-tuning. Mergeable. The first stage trains two numbers for every
    weight, 171,274,752 on ViT-B/16 with class token and positions frozen, and costs more than full fine-tuning; the
    saved adapter has K = round(density * parameters of the towers), 428,993 for 0.5 %. Embeddings and key biases as in
    `LTSFT`. If fewer are left than K, it is those.
    Source: Guo, Rush, Kim, Parameter-Efficient Transfer Learning with Diff Pruning, 2021, and the authors' code.

    Args:
        density: share of the parameters that the second stage trains.
        structured: one more gate for every weight and every bias.
        penalty_weight: weight of the expected number of open gates in the loss.
        entries: how many entries of each tensor; found after the first stage, not to be given.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    choosing = ("density", "structured", "penalty_weight", "entries")
    rewinds = False

    density: float = 0.005
    structured: bool = False
    penalty_weight: float = 1.25e-7
    entries: dict[str, int] | None = None
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.density <= 1, self, f"density must be above 0 and at most 1, not {self.density}")
        require(self.penalty_weight >= 0, self, f"penalty_weight must not be negative, but is {self.penalty_weight}")

    @property
    def stages_after(self) -> int:
        """One, until the entries are chosen."""
        return 1 if self.entries is None else 0

    def candidates(self, tower: Tower) -> dict[str, SparseCandidate]:
        """Weights and biases of all layers, norms included."""
        return candidates_of(tower, range(tower.depth), norms=True, outside="all")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `GatedDelta` at every layer, then one `SparseDelta` at those of which entries are chosen."""
        if self.entries is not None:
            yield from super().place(tower)
            return
        layers: dict[str, tuple[SparseCandidate, list[str]]] = {}
        for name, candidate in self.candidates(tower).items():
            layers.setdefault(name.rpartition(".")[0], (candidate, []))[1].append(candidate.part)
        for candidate, parts in layers.values():
            module = GatedDelta(candidate.layer, parts, self.structured)
            yield Placement(tower.name, candidate.block, candidate.layer.site, module)

    def penalty(self, part: nn.Module) -> torch.Tensor | float:
        """The expected number of gates that are not zero, times its weight."""
        logits = [each for module in _gated(part).values() for each in module.logits()]
        return self.penalty_weight * sum(each.sigmoid().sum() for each in logits)

    def next_stage(
        self,
        towers: Sequence[Tower],
        part: nn.Module,
        start: Mapping[str, torch.Tensor],
        trained: Mapping[str, torch.Tensor],
        measure: Measure,
    ) -> tuple[Method, dict[str, torch.Tensor]]:
        """Keep the largest changes, and their values."""
        changes = {
            f"{path}.{each}": module.dense(each)
            for path, module in _gated(part).items()
            for each in PARTS
            if getattr(module, each) is not None
        }
        left = sum(int((change != 0).sum()) for change in changes.values())
        require(left > 0, self, "its first stage has moved no weight, or shut all gates")
        total = sum(tower.module.get_parameter(name).numel() for tower in towers for name in tower.parameter_names())
        sizes = {name: change.abs() for name, change in changes.items()}
        indices = highest(sizes, min(left, max(1, round(self.density * total))))
        following, tensors = self.with_entries(indices)
        return following, tensors | {name: changes[name].flatten()[i.long()] for name, i in indices.items()}


def _gated(part: nn.Module) -> dict[str, GatedDelta]:
    """By path, <tower>.<block>.<site>."""
    return {path: module for path, module in part.named_modules() if isinstance(module, GatedDelta)}
