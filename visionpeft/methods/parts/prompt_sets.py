"""Several sets of image prompts, with each of which the tower sees every image: PLOT++ (Chen et al., 2023).

The learner `visionpeft.clip.PLOTPlusPlus` attaches this method. https://arxiv.org/abs/2210.01253
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.prompts import RemovePrompts
from visionpeft.sites import Order, Placement


class EnteringSets(nn.Module):
    """Inserts each of several sets of learned tokens into every sample: a batch of samples becomes one of pairs.

    N(0, 0.02^2).

    Args:
        num_sets: number of sets.
        num_tokens: tokens of a set.
        width: of the tokens.
        at: number of prefix tokens.
        norm: what normalises the tokens of the tower before the first block, or None.
    """

    order = Order.ENTER_SPAN

    def __init__(self, num_sets: int, num_tokens: int, width: int, at: int, norm: nn.Module | None):
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(num_sets, num_tokens, width) * 0.02)
        self.num_tokens = num_tokens
        self.at = at
        self._norm = (norm,)  # in a tuple, because it belongs to the backbone

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to (batch * sets, tokens + num_tokens, width), sample by sample."""
        (norm,) = self._norm
        prompts = self.prompts.to(x.dtype)
        prompts = prompts if norm is None else norm(prompts).to(x.dtype)
        prompts = prompts.expand(len(x), -1, -1, -1)
        x = x[:, None].expand(-1, prompts.shape[1], -1, -1)
        return torch.cat((x[:, :, : self.at], prompts, x[:, :, self.at :]), dim=2).flatten(0, 1)


@dataclass(frozen=True)
class PromptSets(Method):
    """Sets of prompts from the first block to the last; the tower gives a feature of each sample with each set.

    They pass the tower's norm before the blocks, as those of MaPLe. N(0, 0.02^2). Not mergeable: it adds tokens.
    Trainable: num_sets * num_tokens * image width.
    Source: Chen et al., PLOT: Prompt Learning with Optimal Transport for Vision-Language Models, 2023 (PLOT++).

    Args:
        num_sets: number of sets.
        num_tokens: prompts of each.
    """

    num_sets: int = 4
    num_tokens: int = 2
    towers = ("visual",)

    def __post_init__(self):
        super().__post_init__()
        require(self.num_sets > 0 and self.num_tokens > 0, self, "num_sets and num_tokens must be positive integers")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """The sets before the first block, and their removal after the last."""
        at, norm = tower.num_prefix_tokens, tower.layers.get("norm_pre")
        owner = None if norm is None else norm.owner
        enter = EnteringSets(self.num_sets, self.num_tokens, tower.width, at, owner)
        yield Placement(tower.name, 0, "stream_in", enter)
        yield Placement(tower.name, tower.depth - 1, "stream_out", RemovePrompts(self.num_tokens, at, spanning=True))
