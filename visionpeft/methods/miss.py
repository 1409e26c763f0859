"""MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure (Kang and Yin, 2024).

https://arxiv.org/abs/2409.15371 (first published as Bone)
"""

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


class SharedShards(nn.Module):
    """y + D^T (sum of the shards of x) for a linear layer y = W x + b; a shard is `rank` features that follow.

    D (rank, out) starts at zero: no change. The last shard of a width that rank does not divide is filled with zeros.
    """

    order = Order.WEIGHT

    def __init__(self, out_features: int, rank: int):
        super().__init__()
        self.D = nn.Parameter(torch.zeros(rank, out_features))

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (..., in) and output y (..., out) of the layer to the changed output (..., out)."""
        rank = len(self.D)
        x = to_parameter_dtype(x, self.D)
        missing = -x.shape[-1] % rank
        shards = (F.pad(x, (0, missing)) if missing else x).unflatten(-1, (-1, rank))
        return y + (shards.sum(-2) @ self.D).to(y.dtype)

    def merge(self, weight: torch.Tensor, bias):
        """Weight and bias that compute the same: W with D^T added to every shard of its columns."""
        repeated = self.D.to(weight).t().repeat(1, -(-weight.shape[1] // len(self.D)))
        return weight + repeated[:, : weight.shape[1]], bias


@dataclass(frozen=True)
class MiSS(Method):
    """Change of weights by one matrix that all shards of the input share: W + [D^T D^T ... D^T], D (rank, out).

    The input is cut into shards of `rank` features, which are added up before D, so that the change costs one narrow
    product. Acts on the rows of q, k and v separately. D is zero: no change at the start. Mergeable. peft reads and
    writes it; of its forms "bat", whose change depends on the weight, and "mini" are not built and refused by name.
    Trainable: sum over target layers of rank * out; 1,179,648 on ViT-B/16 for rank 64 on q and v.
    Source: Kang and Yin, MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure, 2024;
    formula and defaults as in peft.

    Args:
        rank: features of a shard, at most the input width of every target.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    rank: int = 64
    targets: tuple[str, ...] = ("q", "v")
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.rank > 0, self, "rank must be a positive integer")
        require_targets(self)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `SharedShards` at every target layer of the chosen blocks."""
        for index, layer in target_layers(self, tower):
            width = layer.in_features
            sentence = f"{layer.target} reads {width} features, so its rank cannot be {self.rank}"
            require(self.rank <= width, self, sentence)
            yield Placement(tower.name, index, layer.site, SharedShards(layer.out_features, self.rank))
