"""KronA: Parameter Efficient Tuning with Kronecker Adapter (Edalati et al., 2022), https://arxiv.org/abs/2212.10650."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Tower
from visionpeft.errors import ConfigurationError
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require, to_parameter_dtype
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.sites import Order, Placement


class KroneckerChange(nn.Module):
    """y + scale * (A kron B) dropout(x), computed as A X B^T on x folded to X, without the product.

    A (a1, a2) is Kaiming-uniform with a = sqrt(5), B (out / a1, in / a2) is zero: no change at the start.
    """

    stackable = True
    order = Order.WEIGHT

    def __init__(self, in_features: int, out_features: int, shape: tuple[int, int], scale: float, dropout: float):
        super().__init__()
        rows, columns = shape
        self.A = nn.Parameter(torch.empty(rows, columns))
        self.B = nn.Parameter(torch.zeros(out_features // rows, in_features // columns))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (..., in) and output y (..., out) of the layer to the changed output (..., out)."""
        x = self.dropout(to_parameter_dtype(x, self.A)).unflatten(-1, (self.A.shape[1], -1))
        z = F.linear(x, self.B)  # (..., a2, b1)
        change = F.linear(z.transpose(-1, -2), self.A).transpose(-1, -2).flatten(-2)
        return y + (self.scale * change).to(y.dtype)

    def merge(self, weight: torch.Tensor, bias):
        """Weight and bias that compute the same: W + scale * A kron B."""
        return weight + self.scale * torch.kron(self.A.to(weight), self.B.to(weight)), bias


@dataclass(frozen=True)
class KronA(Method):
    """Change of weights by a Kronecker product: W + scale * A kron B, each target with its own A and B.

    The change may have full rank. Acts on the rows of q, k and v separately. A is Kaiming-uniform with a = sqrt(5), B
    zero: no change at the start. Mergeable.
    Trainable: sum over target layers of a1 a2 + (out / a1) (in / a2); 38,400 on ViT-B/16 on q and v, A being 24 x 24.
    Source: Edalati et al., KronA: Parameter Efficient Tuning with Kronecker Adapter, 2022.

    Args:
        shape: rows and columns (a1, a2) of A, which divide the widths of every target; None for the divisors of out
            and in that are nearest to their square roots.
        scale: factor of the change.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        dropout: dropout on the input.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    shape: tuple[int, int] | None = None
    scale: float = 1.0
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        positive = all(n > 0 for n in self.shape or ())
        require(positive, self, f"shape must be two positive integers or None, not {self.shape!r}")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        require_targets(self)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `KroneckerChange` at every target layer of the chosen blocks."""
        for index, layer in target_layers(self, tower):
            module = KroneckerChange(
                layer.in_features, layer.out_features, self._shape(layer), self.scale, self.dropout
            )
            yield Placement(tower.name, index, layer.site, module)

    def _shape(self, layer: Layer) -> tuple[int, int]:
        widths = layer.out_features, layer.in_features
        if self.shape is None:
            return tuple(nearest_divisor(width) for width in widths)
        if any(width % size for width, size in zip(widths, self.shape, strict=True)):
            raise ConfigurationError(
                f"KronA: shape {tuple(self.shape)} does not divide {layer.target}, which maps {widths[1]} to "
                f"{widths[0]} features; use divisors of both widths, or None"
            )
        return tuple(self.shape)


def nearest_divisor(width: int) -> int:
    """The divisor of a width that is nearest to its square root, the smaller of two: 24 of 768."""
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    return min(divisors, key=lambda n: abs(n - math.sqrt(width)))
