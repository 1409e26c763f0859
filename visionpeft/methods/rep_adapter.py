"""RepAdapter: Towards Efficient Visual Adaption via Structural Re-parameterization (Luo et al., 2023).

https://arxiv.org/abs/2302.08106
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require, to_parameter_dtype
from visionpeft.sites import Placement

# position -> site
POSITIONS = {"attention": "attn_in", "mlp": "mlp_in"}


class LinearAdapter(nn.Module):
    """x + scale * (B dropout(A x + a) + b), B the block-diagonal matrix of `groups` parts of `up`.

    A (bottleneck, width) is Xavier-uniform, everything else zero: no change at the start.

    Args:
        width: width D of the tokens.
        bottleneck: width h; `up` is (D, h / groups).
        groups: number of parts of D and h that B connects one by one.
        scale: a fixed number.
        dropout: dropout in the bottleneck.
    """

    stackable = True
    tokenwise = True

    def __init__(self, width: int, bottleneck: int, groups: int, scale: float, dropout: float):
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(bottleneck // groups, width)
        self.groups = groups
        self.scale = scale
        nn.init.xavier_uniform_(self.down.weight)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def dense_up(self) -> torch.Tensor:
        """B (width, bottleneck)."""
        return torch.block_diag(*self.up.weight.chunk(self.groups))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        h = self.dropout(self.down(to_parameter_dtype(x, self.down.weight)))
        return x + (self.scale * F.linear(h, self.dense_up(), self.up.bias)).to(x.dtype)

    def merge_input(self, weight: torch.Tensor, bias: torch.Tensor | None):
        """Weight and bias of a layer that compute the same from x: W (I + s B A) and W s (B a + b) + its bias."""
        into_up = self.scale * weight @ self.dense_up().to(weight)
        shift = into_up @ self.down.bias.to(weight) + self.scale * weight @ self.up.bias.to(weight)
        return weight + into_up @ self.down.weight.to(weight), shift if bias is None else bias + shift


@dataclass(frozen=True)
class RepAdapter(Method):
    """Linear bottlenecks between the norms and what reads them: h + scale * (B (A h + a) + b), B in groups.

    On h = norm1(x) before attention, so that q, k and v read it, and on h = norm2(x) before the MLP. There is
    no activation: it folds into the weights and biases of q, k, v and fc1, on all rows. Where one of these has no bias
    to hold the shift and the shift matters, as for rotated keys, merging is refused. No change at the start.
    Trainable: 2 L (D h + h + D h / groups + D); 239,808 on ViT-B/16 for h = 8 and 2 groups, half of it for attention
    alone. The paper's 0.22 M counts the matrices.
    Source: Luo et al., Towards Efficient Visual Adaption via Structural Re-parameterization, 2023.

    Args:
        bottleneck: width h, a multiple of groups.
        groups: number of parts of channels that B connects one by one.
        scale: a fixed number; the paper chooses it per task from 0.1 to 10.
        positions: "attention", "mlp" or both.
        dropout: dropout in the bottleneck; 0.1 in the paper.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    bottleneck: int = 8
    groups: int = 2
    scale: float = 1.0
    positions: tuple[str, ...] = ("attention", "mlp")
    dropout: float = 0.1
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        counts = (self.bottleneck, self.groups)
        require(all(n > 0 for n in counts), self, "bottleneck and groups must be positive")
        require(
            self.bottleneck % self.groups == 0,
            self,
            f"bottleneck={self.bottleneck} must be a multiple of groups={self.groups}",
        )
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        known = set(self.positions) <= set(POSITIONS) and self.positions
        require(known, self, f"positions must be a list out of {', '.join(POSITIONS)}, not {self.positions!r}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `LinearAdapter` at every position of every chosen block."""
        for index in blocks_of(self, tower):
            for position in dict.fromkeys(self.positions):
                width = tower.blocks[index].width_at(POSITIONS[position])
                divides = width % self.groups == 0
                require(divides, self, f"groups={self.groups} must divide the width {width} of the {tower.name} tower")
                module = LinearAdapter(width, self.bottleneck, self.groups, self.scale, self.dropout)
                yield Placement(tower.name, index, POSITIONS[position], module)
