"""MoV: Pushing Mixture of Experts to the Limit (Zadouri et al., 2023), https://arxiv.org/abs/2309.05444."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.ia3 import TARGETS
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require
from visionpeft.methods.parts.router import Router
from visionpeft.sites import Order, Placement


class MixedScale(nn.Module):
    """x * sum_e p_e s_e with shares p = router(x), for each of `groups` equal parts of the channels by itself.

    The scales s (experts, channels) are one at the start; the parts share the router (experts, channels / groups).
    """

    def __init__(self, channels: int, groups: int, experts: int):
        super().__init__()
        self.scales = nn.Parameter(torch.ones(experts, channels))
        self.router = Router(channels // groups, experts)
        self.groups = groups

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., channels) to the same shape."""
        parts = x.unflatten(-1, (self.groups, -1))
        # The shares add up to 1, so that they may weigh the distances from 1, which no precision rounds at the start.
        change = (self.scales - 1).unflatten(-1, (self.groups, -1))
        scale = 1 + torch.einsum("...ge,egd->...gd", self.router(parts), change)
        return (parts * scale).flatten(-2).to(x.dtype)


class MixedScaleOutput(MixedScale):
    """`MixedScale` of a layer's output."""

    stackable = True
    order = Order.OUTPUT

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map the layer's output y (..., out) to the same shape."""
        return self.scaled(y)


class MixedScaleInput(MixedScale):
    """`MixedScale` of a layer's input."""

    stackable = True
    tokenwise = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (..., in) to the same shape."""
        return self.scaled(x)


@dataclass(frozen=True)
class MoV(Method):
    """Mixture of (IA)^3 vectors that every token weighs for itself: (sum_e p_e s_e) * u on keys, values and hidden u.

    The shares are p = softmax(G u), read from what is scaled: in each head from its own keys or values, with one router
    G (experts, head width) for all heads, and from the hidden activations of the MLP with one router (experts, hidden).
    So the authors' code does it; the paper speaks of a token's representation. Keys and values are those the layers
    give, before any rotary position. The scales s_e are one and G is N(0, 0.02): no change at the start. There is no
    balance loss. Not mergeable: the shares depend on the token. With one expert it is `IA3`.
    Trainable on L blocks with heads of width d: L experts (2 (D + d) + 2 H) for hidden width H; 936,960 on ViT-B/16.
    Source: Zadouri et al., Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient MoE for Instruction
    Tuning, 2023, and the authors' code (for-ai/parameter-efficient-moe).

    Args:
        experts: number of vectors of each target; the paper has 10, 30 and 60.
        targets: what is scaled, out of k v hidden.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    experts: int = 10
    targets: tuple[str, ...] = TARGETS
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.experts > 0, self, "experts must be a positive integer")
        known = set(self.targets) <= set(TARGETS) and self.targets
        require(known, self, f"targets must be a list out of {', '.join(TARGETS)}, not {self.targets!r}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One mixture at every target of every chosen block."""
        for index in blocks_of(self, tower):
            block = tower.blocks[index]
            head_width = block.layer("q").out_features // block.num_heads
            for target in dict.fromkeys(self.targets):
                if target == "hidden":
                    module = MixedScaleInput(block.layer("fc2").in_features, 1, self.experts)
                else:
                    channels = block.layer(target).out_features
                    module = MixedScaleOutput(channels, channels // head_width, self.experts)
                yield Placement(tower.name, index, target, module)
