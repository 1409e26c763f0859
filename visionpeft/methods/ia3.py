"""(IA)^3: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning (Liu et al., 2022).

https://arxiv.org/abs/2205.05638
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require
from visionpeft.sites import Order, Placement

TARGETS = ("k", "v", "hidden")


class ScaleOutput(nn.Module):
    """scale * y on the channels of a layer's output; (out,), one at the start."""

    stackable = True
    order = Order.OUTPUT

    def __init__(self, features: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map the layer's output y (..., out) to the same shape."""
        return (y * self.scale).to(y.dtype)

    def merge(self, weight: torch.Tensor, bias: torch.Tensor | None):
        """Weight and bias that compute the same: diag(scale) W and scale * b."""
        scale = self.scale.to(weight)
        return scale[:, None] * weight, None if bias is None else scale * bias


class ScaleInput(nn.Module):
    """scale * x on the channels of a layer's input; (in,), one at the start."""

    stackable = True
    tokenwise = True

    def __init__(self, features: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (..., in) to the same shape."""
        return (x * self.scale).to(x.dtype)

    def merge_input(self, weight: torch.Tensor, bias: torch.Tensor | None):
        """Weight and bias of the layer that compute the same from x: W diag(scale) and b."""
        return weight * self.scale.to(weight), bias


@dataclass(frozen=True)
class IA3(Method):
    """Learned scales of keys, values and hidden activations: s_k * k, s_v * v and fc2(s_h * act(fc1 x)).

    Where the backbone keeps q, k and v in one matrix, only the rows of k and v are scaled, with their biases. In a
    gated or normalised MLP, s_h scales what fc2 reads. All scales are one at the start: no change. Mergeable.
    Trainable on L blocks of width D with MLP width 4 D: 6 D L; 55,296 on ViT-B/16.
    Source: Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, 2022.

    Args:
        targets: what is scaled, out of k v hidden.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    targets: tuple[str, ...] = TARGETS
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        known = set(self.targets) <= set(TARGETS) and self.targets
        require(known, self, f"targets must be a list out of {', '.join(TARGETS)}, not {self.targets!r}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One scale at every target of every chosen block."""
        for index in blocks_of(self, tower):
            block = tower.blocks[index]
            for target in dict.fromkeys(self.targets):
                if target == "hidden":
                    module = ScaleInput(block.layer("fc2").in_features)
                else:
                    module = ScaleOutput(block.layer(target).out_features)
                yield Placement(tower.name, index, target, module)
