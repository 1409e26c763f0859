"""OFT: Controlling Text-to-Image Diffusion by Orthogonal Finetuning (Qiu et al., 2023), https://arxiv.org/abs/2306.07280."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require, to_parameter_dtype
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.sites import Order, Placement


class Rotation(nn.Module):
    """W0 R x + b for a linear layer W0 x + b, with R = diag(R_1 ... R_n) orthogonal.

    R_i = (I - Q_i) (I + Q_i)^-1, Q_i (block, block) skew-symmetric. Trained is its upper triangle, row by row:
    Q (n, block (block - 1) / 2), which starts at zero: no change.
    """

    order = Order.RENEW

    def __init__(self, in_features: int, block: int):
        super().__init__()
        self.block = block
        self.Q = nn.Parameter(torch.zeros(in_features // block, block * (block - 1) // 2))

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (..., in) and output y (..., out) of the layer to the changed output (..., out)."""
        with torch.autocast(x.device.type, enabled=False):
            turn = cayley_minus_identity(self.Q, self.block)
        x = to_parameter_dtype(x, self.Q)
        # (R - I) x and not R x, so that what is added is exactly nothing where nothing turns.
        moved = turned(turn, x.unflatten(-1, (-1, self.block))).flatten(-2)
        return y + F.linear(moved.to(y.dtype), weight)

    def merge(self, weight: torch.Tensor, bias):
        """Weight and bias that compute the same: W0 R and b."""
        turn = cayley_minus_identity(self.Q.to(weight), self.block)
        rows = turned(turn.transpose(-1, -2), weight.unflatten(-1, (-1, self.block)))  # a row w becomes R^T w
        return weight + rows.flatten(-2), bias


def cayley_minus_identity(upper: torch.Tensor, block: int) -> torch.Tensor:
    """R - I = -2 Q (I + Q)^-1 (..., block, block) for Q skew with this upper triangle (..., block (block - 1) / 2)."""
    rows, columns = torch.triu_indices(block, block, 1, device=upper.device)
    flat = upper.new_zeros(*upper.shape[:-1], block * block).index_copy(-1, rows * block + columns, upper)
    half = flat.unflatten(-1, (block, block))
    Q = (half - half.transpose(-1, -2)).to(torch.promote_types(upper.dtype, torch.float32))  # no solver has less
    turn = torch.linalg.solve(torch.eye(block, dtype=Q.dtype, device=Q.device) + Q, -2 * Q, left=False)
    return turn.to(upper.dtype)


def turned(blocks: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Each matrix of (n, block, block) times its part of x (..., n, block)."""
    return torch.einsum("nij,...nj->...ni", blocks, x)


@dataclass(frozen=True)
class OFT(Method):
    """Rotation of what every neuron reads: W0 R with R = diag(R_1 ... R_n) orthogonal, R_i = (I - Q_i) (I + Q_i)^-1.

    The rows of the weight keep their lengths and the angles between them at every time of training, and its singular
    values stay. Each R_i (block, block) is the Cayley transform of a skew-symmetric Q_i, of which the upper triangle is
    trained; it starts at zero: no change at the start. Acts on the rows of q, k and v separately, each with its own R,
    on the backbone's own weight, before other methods change it. Mergeable, but not two of them at one layer.
    peft computes the inverse by five terms of a series unless `use_cayley_neumann=False`, so that its R is orthogonal
    no longer once Q grows; here the system is solved. With that option `export_peft` and `import_peft` are equal to
    it, where one module of peft has one R: of a fused qkv, q, k and v must have the same.
    Trainable: sum over target layers of in (block - 1) / 2; 285,696 on ViT-B/16 for blocks of 32 on q and v.
    Source: Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, 2023.

    Args:
        block: rows of a block, which divides the input width of every target.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        blocks: which blocks of the backbone, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    block: int = 32
    targets: tuple[str, ...] = ("q", "v")
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.block > 1, self, f"block must be at least 2, not {self.block}")
        require_targets(self)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `Rotation` at every target layer of the chosen blocks."""
        for index, layer in target_layers(self, tower):
            width = layer.in_features
            fits = width % self.block == 0
            require(fits, self, f"{layer.target} reads {width} features, which blocks of {self.block} do not divide")
            yield Placement(tower.name, index, layer.site, Rotation(width, self.block))
