"""BOFT: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization (Liu et al., 2024).

https://arxiv.org/abs/2311.06243
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.tower import Tower
from visionpeft.methods.oft import cayley_minus_identity, turned
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require, to_parameter_dtype
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.sites import Order, Placement


class ButterflyRotation(nn.Module):
    """scale * (W0 R x) + b for a linear layer W0 x + b, R = F_0 F_1 ... F_(m-1) with sparse orthogonal F_i (in, in).

    F_i turns groups of `block` features: half a block each from two places that are 2^i half blocks apart. So F_0 is
    diag(R_1 ... R_n), and each further factor doubles what a feature can reach. The matrices are Cayley transforms of
    skew-symmetric ones as in `OFT`, with the upper triangles Q (factors, in / block, block (block - 1) / 2), which
    start at zero; scale (out,) starts at one: no change.
    """

    order = Order.RENEW

    def __init__(self, in_features: int, out_features: int, block: int, factors: int):
        super().__init__()
        self.block = block
        self.Q = nn.Parameter(torch.zeros(factors, in_features // block, block * (block - 1) // 2))
        self.scale = nn.Parameter(torch.ones(out_features))

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (..., in) and output y (..., out) of the layer to the changed output (..., out)."""
        with torch.autocast(x.device.type, enabled=False):
            factors = cayley_minus_identity(self.Q, self.block)
        x = to_parameter_dtype(x, self.Q)
        moved = torch.zeros_like(x)  # (R - I) x, exactly nothing where nothing turns
        for distance, factor in reversed([(2**i, factor) for i, factor in enumerate(factors)]):
            moved = moved + self._turned(factor, x + moved, distance)
        y = y + F.linear(moved.to(y.dtype), weight)
        changed = self.scale * y if bias is None else torch.addcmul((1 - self.scale) * bias, y, self.scale)
        return changed.to(y.dtype)

    def merge(self, weight: torch.Tensor, bias):
        """Weight and bias that compute the same: scale * (W0 R) by rows, and b."""
        factors = cayley_minus_identity(self.Q.to(weight), self.block).transpose(-1, -2)  # a row w becomes R^T w
        for i, factor in enumerate(factors):
            weight = weight + self._turned(factor, weight, 2**i)
        return self.scale.to(weight)[:, None] * weight, bias

    def _turned(self, blocks: torch.Tensor, x: torch.Tensor, distance: int) -> torch.Tensor:
        """(..., in): matrices (n, block, block) times the groups of x whose halves are so many half blocks apart."""
        if distance == 1:
            return turned(blocks, x.unflatten(-1, (-1, self.block))).flatten(-2)
        # from (..., n / distance, distance, 2, block / 2) to (..., n, block) and back
        groups = x.unflatten(-1, (-1, 2, distance, self.block // 2)).transpose(-3, -2)
        groups = turned(blocks, groups.flatten(-2).flatten(-3, -2))
        return groups.unflatten(-1, (2, -1)).unflatten(-3, (-1, distance)).transpose(-3, -2).flatten(-4)


@dataclass(frozen=True)
class BOFT(Method):
    """Rotation of what every neuron reads by a product of sparse factors, and a scale of rows: scale * (W0 R).

    R = F_0 F_1 ... F_(m-1) is orthogonal, each F_i a block diagonal of Cayley transforms, permuted like a step of the
    fast Fourier transform, so that m factors with blocks of b connect b 2^(m-1) features. All start as the identity,
    the scales at one: no change at the start. Acts on the rows of q, k and v separately, each with its own R, on the
    backbone's own weight, before other methods change it. Mergeable, but not two of them at one layer.
    peft stores whole blocks, of which half the numbers do not act, and without its compiled extension it takes one
    factor whatever was asked for; here nothing is stored twice, and no extension is needed. Its files are read and
    written, where one module of peft has one R: of a fused qkv, q, k and v must have the same.
    Trainable: sum over target layers of factors in (block - 1) / 2 + out; 129,024 on ViT-B/16 on q and v, 46,080 with
    one factor.
    Source: Liu et al., Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, 2024; that its vision
    experiments have 4 factors with blocks of 4 is recalled, not read.

    Args:
        block: size b of the blocks, even where there are several factors.
        factors: number m of factors; block 2^(factors - 1) must divide the input width of every target.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        blocks: which blocks of the backbone, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    block: int = 4
    factors: int = 4
    targets: tuple[str, ...] = ("q", "v")
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.block > 1, self, f"block must be at least 2, not {self.block}")
        require(0 < self.factors < 32, self, f"factors must be a positive integer below 32, not {self.factors}")
        halves = self.factors == 1 or self.block % 2 == 0
        require(halves, self, f"several factors need blocks of an even size, not {self.block}")
        require_targets(self)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `ButterflyRotation` at every target layer of the chosen blocks."""
        group = self.block * 2 ** (self.factors - 1)
        for index, layer in target_layers(self, tower):
            width = layer.in_features
            whole = f"{self.factors} factors with blocks of {self.block} connect groups of {group}"
            require(width % group == 0, self, f"{layer.target} reads {width} features, but {whole}")
            module = ButterflyRotation(width, layer.out_features, self.block, self.factors)
            yield Placement(tower.name, index, layer.site, module)
