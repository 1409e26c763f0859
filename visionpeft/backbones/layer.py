"""What a layer of a backbone looks like to a method: the rows of a weight and bias that make one output."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn

from visionpeft.backbones.quantised import has_rows
from visionpeft.errors import UnsupportedError

# target of a layer -> site whose tokens it takes
READS = dict.fromkeys(("q", "k", "v", "gate"), "attn_in") | {"fc1": "mlp_in", "fc2": "hidden"}


@dataclass
class Layer:
    """The rows of a weight and bias that make the output of one layer site.

    Args:
        site: name of the site: "q", "fc1_g", "norm1", "patch_embed".
        kind: "linear", "conv" or "norm".
        owner: module that holds the weight.
        weight: name of the weight parameter in `owner`.
        bias_owner: module that holds the bias parameter, or None if this layer has none.
        bias: name of the bias parameter in `bias_owner`.
        rows: rows of a fused weight, or None for all.
        bias_rows: rows of a fused bias, or None for all.
        called: whether `owner` is called, so that its class can be swapped; otherwise the attention reads its weight.
        target: the name users address it by, where it differs from the site.
        shift_sink: (module, parameter name, index) where a constant shift of the output can be folded into when the
            layer has no bias, such as the position embedding after a patch convolution.
        shift_is_void: whether a constant shift of the output changes nothing. So it is for keys that are neither
            rotated nor normalised: it adds the same to all scores of a query.
        reads: the site whose tokens the layer takes as they are, by default that of its name; "" for none.
        channels_first: whether its output is (batch, out, rows, columns); by default so for convolutions alone.
        groups: further targets that address it with others of its kind.
        changed: when what acts there changes the weight that is read, instead of the output: "never"; "if needed",
            where something acts that can do nothing else; or "always", for layers that do more than multiply, or whose
            weight is read without a call.
        overwritten: whether what follows may overwrite the output in place, so that nothing may keep it.
    """

    site: str
    kind: str
    owner: nn.Module
    weight: str = "weight"
    bias_owner: nn.Module | None = None
    bias: str = "bias"
    rows: slice | None = None
    bias_rows: slice | None = None
    called: bool = True
    target: str = ""
    shift_sink: tuple[nn.Module, str, tuple] | None = None
    shift_is_void: bool = False
    reads: str | None = None
    channels_first: bool | None = None
    groups: tuple[str, ...] = ()
    changed: Literal["never", "if needed", "always"] = "never"
    overwritten: bool = False

    def __post_init__(self):
        if self.channels_first is None:
            self.channels_first = self.kind == "conv"
        self.target = self.target or self.site
        if self.reads is None:
            self.reads = READS.get(self.target, "")
        if self.bias_owner is None and self.called and getattr(self.owner, self.bias, None) is not None:
            self.bias_owner = self.owner
        weight = getattr(self.owner, self.weight)
        if not has_rows(weight):
            raise UnsupportedError(
                f"{type(self.owner).__name__} keeps its weight as a {type(weight).__name__} of torchao, of which no "
                "rows can be read; quantise with Int8WeightOnlyConfig, IntxWeightOnlyConfig or Float8WeightOnlyConfig"
            )
        if weight.is_complex():
            raise UnsupportedError(f"{type(self.owner).__name__} has a complex weight, beside which nothing is trained")

    @property
    def weight_tensor(self) -> torch.Tensor:
        """The weight rows: (out, in) for linear, (out, in, kernel, kernel) for conv, (width,) for norm."""
        weight = getattr(self.owner, self.weight)
        return weight if self.rows is None else weight[self.rows]

    @property
    def matrix(self) -> torch.Tensor:
        """The weight rows as (out, in); of a convolution, in are the values that make one of its output."""
        weight = self.weight_tensor
        return weight.flatten(1) if weight.ndim > 2 else weight

    @property
    def bias_tensor(self) -> torch.Tensor | None:
        """The bias rows (out,), or None."""
        if self.bias_owner is None:
            return None
        bias = getattr(self.bias_owner, self.bias)
        return bias if self.bias_rows is None else bias[self.bias_rows]

    @property
    def trailing(self) -> tuple[int, ...]:
        """What follows (out,) in the shape by which a value for each channel meets the output."""
        return (1, 1) if self.channels_first else ()

    @property
    def out_features(self) -> int:
        """Width of the layer's output."""
        return self.weight_tensor.shape[0]

    @property
    def in_features(self) -> int:
        """Width of the layer's input; for a convolution the number of values that make one of its output."""
        return math.prod(self.weight_tensor.shape[1:])

    def named_by(self, targets: Iterable[str]) -> str | None:
        """The first of some targets that means this layer, or None."""
        return next((target for target in targets if target == self.target or target in self.groups), None)
