"""KAdaptation: Parameter-efficient Model Adaptation for Vision Transformers (He et al., 2023).

https://arxiv.org/abs/2203.16329
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.errors import ConfigurationError
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require, to_parameter_dtype
from visionpeft.methods.parts.kronecker_sum import Rule, kronecker_sum, kronecker_sum_weight
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.sites import Order, Placement, Shared


class KroneckerSumChange(nn.Module):
    """y + sum_i (A_i kron u_i^T v_i) dropout(x) with shared A_i.

    u (terms, rank, out / terms) is normal with standard deviation 1 / sqrt(rank), v (terms, rank, in / terms) zero.
    """

    stackable = True
    order = Order.WEIGHT

    def __init__(self, rule: Rule, in_features: int, out_features: int, rank: int, dropout: float):
        super().__init__()
        terms = len(rule.A)
        self._rule = (rule,)  # in a tuple, because the adapter owns it once for all layers
        self.u = nn.Parameter(torch.randn(terms, rank, out_features // terms) / rank**0.5)
        self.v = nn.Parameter(torch.zeros(terms, rank, in_features // terms))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (..., in) and output y (..., out) of the layer to the changed output (..., out)."""
        x = self.dropout(to_parameter_dtype(x, self.v))
        return y + kronecker_sum(self._rule[0].A, self.u, self.v, x).to(y.dtype)

    def merge(self, weight: torch.Tensor, bias):
        """Weight and bias that compute the same: W + sum_i A_i kron u_i^T v_i."""
        A, u, v = (tensor.to(weight) for tensor in (self._rule[0].A, self.u, self.v))
        return weight + kronecker_sum_weight(A, u, v), bias


@dataclass(frozen=True)
class KAdaptation(Method):
    """Change of weights by a sum of Kronecker products: W + sum_i A_i kron u_i^T v_i.

    The small matrices A_i (terms x terms) are shared by all target layers of a tower, the low-rank factors u and v are
    each layer's own. Acts on the rows of q, k and v separately. A is Glorot-uniform, u normal, v zero: no change at the
    start. The paper chooses the matrices by their local intrinsic dimension; here `targets` names them. Mergeable.
    The authors' code starts with both low-rank factors at zero, so that neither ever moves, never uses those of v, and
    scrambles the product by a reshape; it has 32 terms, a scale of 160, weights dropped at 0.5 and A_i of rank one from
    U(-0.01, 0.01). This is the formula. Weights change 17 times as far in a step as LoRA's at the same rate.
    Trainable: terms^3 + sum over target layers of rank * (in + out); 36,928 on ViT-B/16 on q and v.
    Source: He et al., Parameter-efficient Model Adaptation for Vision Transformers, 2023.

    Args:
        terms: number of Kronecker products, and rows and columns of A_i; divides the widths of every target.
        rank: rank of each u_i^T v_i.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        dropout: dropout on the input.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    terms: int = 4
    rank: int = 1
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("terms", "rank"):
            value = getattr(self, name)
            require(value > 0, self, f"{name} must be a positive integer")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        require_targets(self)

    def place(self, tower: Tower) -> Iterator[Placement | Shared]:
        """The shared matrices, and one `KroneckerSumChange` at every target layer of the chosen blocks."""
        layers = target_layers(self, tower)
        for _, layer in layers:
            if layer.in_features % self.terms or layer.out_features % self.terms:
                raise ConfigurationError(
                    f"KAdaptation: terms={self.terms} does not divide {layer.target}, which maps {layer.in_features} "
                    f"to {layer.out_features} features; use a divisor of both"
                )
        rule = Rule(self.terms)
        yield Shared(tower.name, "rule", rule)
        for index, layer in layers:
            module = KroneckerSumChange(rule, layer.in_features, layer.out_features, self.rank, self.dropout)
            yield Placement(tower.name, index, layer.site, module)
