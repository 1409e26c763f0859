"""A trained change of single entries of weights and biases, and which entries are chosen by their scores."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.quantised import is_quantised
from visionpeft.backbones.tower import Tower
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.methods.parts.layer_delta import LayerDelta
from visionpeft.sites import Placement
from visionpeft.sites.frozen_layers import sparse_product

PARTS = ("weight", "bias")


@dataclass(frozen=True)
class SparseCandidate:
    """A weight or bias some of whose entries may be trained.

    Args:
        block: index of the block, or None for a final norm.
        layer: the layer it belongs to.
        part: "weight" or "bias".
    """

    block: int | None
    layer: Layer
    part: str

    @property
    def values(self) -> torch.Tensor:
        """The rows of the backbone's parameter: (out, in) or (out,)."""
        return self.layer.weight_tensor if self.part == "weight" else self.layer.bias_tensor

    @property
    def parameter(self) -> nn.Parameter:
        """The whole parameter of the backbone."""
        owner, name, _ = self._address
        return getattr(owner, name)

    def rows_of(self, whole: torch.Tensor) -> torch.Tensor:
        """Of a tensor shaped like the parameter, the rows of this layer."""
        rows = self._address[2]
        return whole if rows is None else whole[rows]

    @property
    def _address(self) -> tuple[nn.Module, str, slice | None]:
        layer = self.layer
        if self.part == "weight":
            return layer.owner, layer.weight, layer.rows
        return layer.bias_owner, layer.bias, layer.bias_rows


def candidates_of(
    tower: Tower,
    blocks: Sequence[int],
    norms: bool,
    *,
    outside: Literal["all", "final_norms", "none"] = "final_norms",
    key_bias: bool = False,
) -> dict[str, SparseCandidate]:
    """Weights and biases of the linear layers of the blocks, and with `norms` those of the norms, by name.

    Of what is outside the blocks, the final norms belong to the last block, or all layers are there, the patch
    embedding among them, or none. Without `key_bias` it is left out: unless keys are rotated or normalised it has no
    gradient. Weights of norms other than LayerNorm are left out in any case.
    """
    found = {}
    for index, layer in tower.all_layers():
        here = index in blocks
        if index is None:
            final = layer.site in tower.final_norms and tower.depth - 1 in blocks
            here = outside == "all" or (outside == "final_norms" and final)
        if not here or (layer.kind == "norm" and not norms):
            continue
        path = ".".join(str(part) for part in (tower.name, index, layer.site) if part is not None)
        if is_quantised(layer.weight_tensor):
            raise UnsupportedError(f"the weight of {path} is quantised, so that single entries of it cannot be trained")
        if layer.kind != "norm" or (isinstance(layer.owner, nn.LayerNorm) and not layer.channels_first):
            found[f"{path}.weight"] = SparseCandidate(index, layer, "weight")
        if layer.bias_tensor is not None and (key_bias or layer.site != "k"):
            found[f"{path}.bias"] = SparseCandidate(index, layer, "bias")
    return found


def number_of(density: float, candidates: Mapping[str, SparseCandidate]) -> int:
    """How many entries a share of all entries is, at least one."""
    return max(1, round(density * sum(candidate.values.numel() for candidate in candidates.values())))


def highest(scores: Mapping[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """Flat indices, ascending, of the entries with the highest scores of all tensors together."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    chosen = largest(flat, min(number, len(flat))).sort().values
    ends = torch.tensor([score.numel() for score in scores.values()], device=flat.device).cumsum(0)
    parts = chosen.tensor_split(torch.searchsorted(chosen, ends)[:-1].cpu())
    found = {}
    for name, score, end, part in zip(scores, scores.values(), ends, parts, strict=True):
        if len(part):
            found[name] = (part - (end - score.numel())).to(torch.int32)
    return found


def largest(values: torch.Tensor, number: int) -> torch.Tensor:
    """Indices of so many of the largest values (n,), in any order; of equal ones any.

    On a CPU `topk` sorts pairs of 16 bytes, 1.4 GB of them and for a second and a half among the weights of ViT-B/16.
    So those are left out first that are less than a value which more than `number` reach, as a sample tells.
    """
    stride = number // 256
    if values.device.type == "cpu" and stride > 1 and 4 * number < len(values):
        sample = values[::stride]
        expected = number / stride
        above = math.ceil(expected + 4 * math.sqrt(expected))
        kept = (values >= sample.topk(above, sorted=False).values.min()).nonzero().flatten()
        if len(kept) >= number:  # else the sample was far from all
            return kept[values[kept].topk(number, sorted=False).indices]
    return values.topk(number, sorted=False).indices


def indices_by_name(candidates: Mapping[str, SparseCandidate], entries: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Room for so many indices of each of these tensors; what they are comes with the saved adapter."""
    for name, number in entries.items():
        if name in candidates and not 0 < number <= candidates[name].values.numel():
            raise ConfigurationError(f"entries: {name} has {candidates[name].values.numel()} entries, not {number}")
    return {name: torch.zeros(entries[name], dtype=torch.int32) for name in candidates if name in entries}


def sparse_placements(
    tower: Tower, candidates: Mapping[str, SparseCandidate], indices: Mapping[str, torch.Tensor]
) -> Iterator[Placement]:
    """One `SparseDelta` at every layer of which entries are chosen."""
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for name, index in indices.items():
        path, _, part = name.rpartition(".")
        by_layer.setdefault(path, {})[part] = index
    for path, parts in by_layer.items():
        candidate = candidates[f"{path}.{next(iter(parts))}"]
        yield Placement(tower.name, candidate.block, candidate.layer.site, SparseDelta(candidate.layer, **parts))


def entries_of(part: nn.Module) -> dict[str, int]:
    """How many entries of each tensor the placed modules of a method train."""
    return {name.removesuffix("_index"): len(index) for name, index in part.named_buffers() if name.endswith("_index")}


def index_tensors(indices: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The indices under the names that the buffers of the placed modules have."""
    return {f"{name}_index": index for name, index in indices.items()}


def united(
    parts: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]
) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Numbers of entries and tensors of sparse changes that are weighted sums of those of several adapters."""
    entries, tensors = {}, {}
    for key in dict.fromkeys(key for part in parts for key in part if key.endswith("_index")):
        name = key.removesuffix("_index")
        having = [
            (part[key], w * part[name].double(), part[name])
            for part, w in zip(parts, weights, strict=True)
            if key in part
        ]
        index, place = torch.cat([index for index, _, _ in having]).unique(return_inverse=True)
        values = torch.zeros(len(index), dtype=torch.float64).index_add(0, place, torch.cat([v for _, v, _ in having]))
        entries[name] = len(index)
        tensors |= {key: index.to(torch.int32), name: values.to(having[0][2].dtype)}
    return entries, tensors


class SparseDelta(LayerDelta):
    """A layer whose weight is W + D and whose bias is b + d, where D and d are zero but for some trained entries.

    What is trained and saved are the values of these entries (number,), zero at the start, and their flat indices.

    Args:
        layer: a linear layer, a patch convolution or a LayerNorm.
        weight: flat indices (number,) of the trained entries of the weight, or None.
        bias: of the bias, or None.
    """

    def __init__(self, layer: Layer, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None):
        super().__init__(layer)
        for part, index in (("weight", weight), ("bias", bias)):
            values = None if index is None else nn.Parameter(torch.zeros(len(index)))
            self.register_parameter(part, values)
            self.register_buffer(f"{part}_index", index)

    # Said here, beside `sparse_change`: what a class says of itself holds for a forward of its own.
    forward = LayerDelta.forward

    def product(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """D x; of a linear layer, without making D."""
        if self.kind == "linear":
            return sparse_product(x, self.weight, self.weight_index, self.shape, dtype)
        return super().product(x, dtype)

    def sparse_change(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] | None:
        """Values and flat indices of D, and d, for a linear layer."""
        of_bias = None if self.bias is None else self.dense("bias")
        return (self.weight, self.weight_index, of_bias) if self.kind == "linear" else None

    def dense(self, part: str) -> torch.Tensor:
        """The change as a tensor like the weight or bias, zeros included."""
        return scatter(getattr(self, part), getattr(self, f"{part}_index"), self.shape[: 1 if part == "bias" else None])


def scatter(values: torch.Tensor, index: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Zeros of this shape with the values at their flat indices."""
    return values.new_zeros(shape).flatten().scatter(0, index.long(), values).view(shape)
