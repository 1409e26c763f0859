"""FAR, freeze and reconfigure: Efficient Fine-Tuning of BERT Models on the Edge (Vucetic et al., 2022).

https://arxiv.org/abs/2205.01541
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Measure, Method, blocks_of, require, require_same, to_parameter_dtype
from visionpeft.methods.parts.entries import moved, names_of
from visionpeft.methods.parts.sparse_delta import SparseCandidate, candidates_of
from visionpeft.sites import Order, Placement


class NeuronRows(nn.Module):
    """A layer W x + b some of whose outputs get a trained change: y_j + D_j x + d_j, both zero at the start.

    `weight` (number, in) and `bias` (number,) are D and d, `index` (number,) the outputs j.
    """

    order = Order.WEIGHT

    def __init__(self, layer: Layer, number: int):
        super().__init__()
        self.channels = 1 if layer.channels_first else -1
        self.weight = nn.Parameter(torch.zeros(number, layer.in_features))
        self.bias = None if layer.bias_tensor is None else nn.Parameter(torch.zeros(number))
        self.register_buffer("index", torch.arange(number, dtype=torch.int32))

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (..., in) and output y (..., out) of the layer to the changed output (..., out).

        Of a convolution of single pixels, x is (batch, in, h, w) and y (batch, out, h, w).
        """
        change = F.linear(to_parameter_dtype(x, self.weight).movedim(self.channels, -1), self.weight, self.bias)
        return y.index_add(self.channels, self.index.long(), change.movedim(-1, self.channels).to(y.dtype))

    def merge(self, weight: torch.Tensor, bias):
        """Weight and bias that compute the same."""
        index = self.index.long()
        if bias is not None:
            bias = bias.index_add(0, index, self.bias.to(bias))
        return weight.index_add(0, index, self.weight.to(weight).view(-1, *weight.shape[1:])), bias


class NeuronColumns(nn.Module):
    """A layer W x + b that reads some of its inputs by a changed weight: y + D x_J, D zero at the start.

    `weight` (out, number) is D, `index` (number,) the inputs J. Of x, those alone are kept for the backward pass.
    """

    order = Order.WEIGHT

    def __init__(self, layer: Layer, number: int):
        super().__init__()
        self.channels = 1 if layer.channels_first else -1
        self.weight = nn.Parameter(torch.zeros(layer.out_features, number))
        self.register_buffer("index", torch.arange(number, dtype=torch.int32))

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (..., in) and output y (..., out) of the layer to the changed output (..., out).

        Of a convolution of single pixels, x is (batch, in, h, w) and y (batch, out, h, w).
        """
        read = to_parameter_dtype(x.index_select(self.channels, self.index.long()), self.weight)
        return y + F.linear(read.movedim(self.channels, -1), self.weight).movedim(-1, self.channels).to(y.dtype)

    def merge(self, weight: torch.Tensor, bias):
        """Weight and bias that compute the same."""
        change = self.weight.to(weight).view(*self.weight.shape, *weight.shape[2:])
        return weight.index_add(1, self.index.long(), change), bias


@dataclass(frozen=True)
class FAR(Method):
    """Trains the neurons of each MLP that a short training moves most: their rows of fc1 and columns of fc2.

    Two stages (`visionpeft.stages`; the command line does both, and `--stage_epochs [1]` makes the first one short, as
    it is meant to be). In the first, "priming", fc1 and the weight of fc2 are trained whole. The size of neuron j is
    the sum of |change| over its row of fc1, its bias and its column of fc2. In each block the `share` of largest size
    are the learners; everything, the head as well, goes back to where it began, and the learners alone are trained,
    as a change of rows and columns that is zero at the start. The layers are split, so that of what fc2 reads the
    learners alone are kept for the backward pass: the method is made for memory. In a gated MLP a neuron is a row of
    each half of fc1. Mergeable.
    Trained in the end: L n (2 D + 1) with n = round(share * 4 D); 5,662,308 on ViT-B/16 for a tenth.
    Source: Vucetic, Tayaranian, Ziaeefard, Clark, Meyer, Gross, Efficient Fine-Tuning of BERT Models on the Edge, 2022,
    whose code is not published; the steps are recalled, not checked: there all layers but those of the MLPs may be
    trained as well, which `vp.attach(..., train=...)` does, and going back to the start after priming is ours.

    Args:
        share: share of the neurons of each block that learn.
        neurons: how many learn in each block; found after the first stage, not to be given.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    found: ClassVar[tuple[str, ...]] = ("neurons",)

    share: float = 0.1
    neurons: dict[str, int] | None = None
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.share <= 1, self, f"share must be above 0 and at most 1, not {self.share}")

    @property
    def stages_after(self) -> int:
        """One, until the learners are chosen."""
        return 1 if self.neurons is None else 0

    def trains(self, tower: Tower) -> Iterator[str]:
        """In the first stage, what belongs to a neuron."""
        if self.neurons is None:
            yield from dict.fromkeys(names_of(tower, self._candidates(tower)).values())

    def place(self, tower: Tower) -> Iterator[Placement]:
        """In the second stage, `NeuronRows` at fc1 and `NeuronColumns` at fc2 of every chosen block."""
        if self.neurons is None:
            return
        for candidate in self._candidates(tower).values():
            number, layer = self.neurons.get(f"{tower.name}.{candidate.block}", 0), candidate.layer
            if candidate.part == "bias" or not number:
                continue
            if layer.target == "fc2":
                module = NeuronColumns(layer, number)
            else:
                module = NeuronRows(layer, number * (layer.out_features // _hidden(tower, candidate.block)))
            yield Placement(tower.name, candidate.block, layer.site, module)

    def next_stage(
        self,
        towers: Sequence[Tower],
        part: nn.Module,
        start: Mapping[str, torch.Tensor],
        trained: Mapping[str, torch.Tensor],
        measure: Measure,
    ) -> tuple[Method, dict[str, torch.Tensor]]:
        """Choose the neurons that have moved most."""
        sizes, layers = {}, {}
        for tower in towers:
            candidates = self._candidates(tower)
            for key, change in moved(tower, candidates, trained).items():
                candidate = candidates[key]
                hidden, block = _hidden(tower, candidate.block), f"{tower.name}.{candidate.block}"
                of_inputs = candidate.layer.target == "fc2"
                change = change.double().flatten(1) if candidate.part == "weight" else change.double()
                sizes[block] = sizes.get(block, 0) + _of_neurons(change, hidden, of_inputs)
                if candidate.part == "weight":
                    layers[key.removesuffix(".weight")] = block, candidate.layer.out_features // hidden, candidate.layer
        require(any(each.any() for each in sizes.values()), self, "its first stage has moved no weight to choose by")
        chosen = {block: each.topk(self._number(len(each))).indices.sort().values for block, each in sizes.items()}
        tensors = {}
        for path, (block, halves, layer) in layers.items():
            index = chosen[block]
            if layer.target != "fc2":
                index = torch.cat([index + half * len(sizes[block]) for half in range(halves)])
            tensors[f"{path}.index"] = index.to(torch.int32)
        return dataclasses.replace(self, neurons={block: len(index) for block, index in chosen.items()}), tensors

    def combine(self, methods, parts, weights):
        """The weighted sum of the changes, with the learners of all."""
        require_same(methods, but=("share", "neurons"))
        tensors, neurons = {}, {}
        for key in dict.fromkeys(key for part in parts for key in part if key.endswith(".index")):
            path = key.removesuffix(".index")
            having = [(part, weight) for part, weight in zip(parts, weights, strict=True) if key in part]
            index, place = torch.cat([part[key] for part, _ in having]).unique(return_inverse=True)
            tensors[key] = index.to(torch.int32)
            of_inputs = path.endswith(".fc2")
            for name in ("weight", "bias"):
                if f"{path}.{name}" in having[0][0]:
                    dim = int(of_inputs and name == "weight")
                    values = torch.cat([weight * part[f"{path}.{name}"].double() for part, weight in having], dim)
                    shape = [*values.shape]
                    shape[dim] = len(index)
                    summed = values.new_zeros(shape).index_add(dim, place, values)
                    tensors[f"{path}.{name}"] = summed.to(having[0][0][f"{path}.{name}"].dtype)
            if of_inputs:
                neurons[path.removesuffix(".fc2")] = len(index)
        return dataclasses.replace(self, neurons=neurons), tensors

    def _candidates(self, tower: Tower) -> dict[str, SparseCandidate]:
        """fc1 with its bias and the weight of fc2, by name."""
        for index in blocks_of(self, tower):
            tower.blocks[index].layer("fc2")  # refuses blocks whose MLPs are several, or end in a layer they share
        every = candidates_of(tower, blocks_of(self, tower), norms=False)
        found = {
            name: candidate
            for name, candidate in every.items()
            if candidate.layer.target == "fc1" or (candidate.layer.target == "fc2" and candidate.part == "weight")
        }
        require(bool(found), self, f"the blocks of the {tower.name} tower have no MLP")
        return found

    def _number(self, hidden: int) -> int:
        return max(1, round(self.share * hidden))


def _of_neurons(change: torch.Tensor, hidden: int, of_inputs: bool) -> torch.Tensor:
    """Sums (neurons,) over what belongs to each: columns (out, neurons), or rows (neurons, ...) of each half of fc1."""
    return change.sum(0) if of_inputs else change.reshape(-1, hidden, change[0].numel()).sum(dim=(0, 2))


def _hidden(tower: Tower, block: int) -> int:
    """The number of neurons of a block."""
    return tower.layer(block, "fc2").in_features
