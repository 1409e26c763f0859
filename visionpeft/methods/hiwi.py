"""HiWi: Parameter-Efficient Fine-Tuning without Introducing New Latency (Liao et al., 2023).

https://arxiv.org/abs/2305.16742
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.methods.parts.weight_change import WeightChange
from visionpeft.sites import Order, Placement


class AdapterOfWeight(WeightChange):
    """(W0 + up(relu(down(W0)))) x + b: a bottleneck adapter that reads the rows of the weight instead of tokens.

    down (in to bottleneck) and its bias start as PyTorch's linear layers do, up (bottleneck to in) at zero: no change.
    """

    order = Order.RENEW

    def __init__(self, in_features: int, bottleneck: int):
        super().__init__()
        self.down = nn.Linear(in_features, bottleneck)
        self.up = nn.Linear(bottleneck, in_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def change(self, like: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """up(relu(down(W0))) by rows (out, in)."""
        down, up = self.down, self.up
        hidden = F.relu(F.linear(weight, down.weight.to(like), down.bias.to(like)))
        return F.linear(hidden, up.weight.to(like), up.bias.to(like))


@dataclass(frozen=True)
class HiWi(Method):
    """Adapters that read weights instead of tokens: W0 + up(relu(down(W0))), row by row.

    What acts is a weight, so that nothing is left of the adapter after merging. Acts on the rows of q, k and v
    separately, on the backbone's own weight, before other methods change it. up is zero: no change at the start.
    Mergeable, but not two of them at one layer. The paper's form that changes biases is not built: trained biases are
    `BitFit`.
    Trainable: sum over target layers of 2 * in * bottleneck + bottleneck + in; 313,536 on ViT-B/16 for a bottleneck of
    8 on q and v.
    Source: Liao et al., Parameter-Efficient Fine-Tuning without Introducing New Latency, 2023. Its repository holds no
    code; the formula is recalled, and that up starts at zero, relu and the bottleneck are this library's choice.

    Args:
        bottleneck: width of the adapter.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    bottleneck: int = 8
    targets: tuple[str, ...] = ("q", "v")
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.bottleneck > 0, self, "bottleneck must be a positive integer")
        require_targets(self)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `AdapterOfWeight` at every target layer of the chosen blocks."""
        for index, layer in target_layers(self, tower):
            yield Placement(tower.name, index, layer.site, AdapterOfWeight(layer.in_features, self.bottleneck))
