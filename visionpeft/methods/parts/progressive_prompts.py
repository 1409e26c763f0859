"""Prompts that travel through all blocks of an image tower, into which each block mixes its own (Xu et al., 2023).

The learner `visionpeft.clip.ProVP` attaches this method. https://arxiv.org/abs/2304.08386
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.prompts import Prompts, RemovePrompts, uniform_prompts
from visionpeft.sites import Placement


class MixedPrompts(nn.Module):
    """What came out of the last block for the prompts becomes carry * it + (1 - carry) * P, P (num_tokens, width).

    Args:
        prompts: initial values of P.
        carry: share of what came out of the block before.
        entered: the module whose prompts these are.
    """

    def __init__(self, prompts: torch.Tensor, carry: float, entered: Prompts):
        super().__init__()
        self.prompts = nn.Parameter(prompts)
        self.carry = carry
        self._entered = (entered,)  # in a tuple, because it has its own place in the adapter

    @property
    def located_at(self) -> nn.Module:
        """The module that inserted the prompts."""
        return self._entered[0]

    def forward(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """Map tokens (batch, tokens, width), the first prompt at `first`, to the same shape."""
        stop = first + len(self.prompts)
        mixed = self.carry * x[:, first:stop] + (1 - self.carry) * self.prompts.to(x.dtype)
        return torch.cat((x[:, :first], mixed, x[:, stop:]), dim=1)


@dataclass(frozen=True)
class ProgressivePrompts(Method):
    """Prompts before the patches: P_0 in block 0; before block l > 0, carry * (what came out) + (1 - carry) * P_l.

    With carry 0 they are those of `VPT(deep=True)`. All start as those of `VPT`. Not mergeable: it adds tokens.
    Trainable on L blocks of width D: L * num_tokens * D.
    Source: Xu et al., Progressive Visual Prompt Learning with Contrastive Feature Re-formation, 2023.

    Args:
        num_tokens: prompts per block.
        carry: share of what came out of the block before, from 0 to less than 1.
    """

    num_tokens: int = 16
    carry: float = 0.01
    towers = ("visual",)

    def __post_init__(self):
        super().__post_init__()
        require(self.num_tokens > 0, self, "num_tokens must be a positive integer")
        require(0 <= self.carry < 1, self, f"carry must be a share from 0 to less than 1, not {self.carry}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """Prompts of block 0 that leave after the last block, and at each later one what mixes in its own."""
        require(tower.patch_size, self, f"the {tower.name} tower has no patches")
        at = tower.num_prefix_tokens
        first, *later = (uniform_prompts(tower, self.num_tokens) for _ in range(tower.depth))
        enter = Prompts(first, at, dropout=0.0, projection=None, spanning=True)
        yield Placement(tower.name, 0, "stream_in", enter)
        for index, prompts in enumerate(later, start=1):
            yield Placement(tower.name, index, "stream_in", MixedPrompts(prompts, self.carry, enter))
        yield Placement(tower.name, tower.depth - 1, "stream_out", RemovePrompts(self.num_tokens, at, spanning=True))
