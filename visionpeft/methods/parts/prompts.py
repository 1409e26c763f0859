"""Tokens that enter a block after the prefix tokens, and leave a block again."""

import math
from abc import abstractmethod

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.sites import Order


def uniform_prompts(
    tower: Tower, num_tokens: int, width: int | None = None, projection: int | None = None
) -> torch.Tensor:
    """First prompts (num_tokens, width) of VPT on a tower with patches: U(-v, v), v = sqrt(6 / (3 * patch + width)).

    Args:
        tower: the tower.
        num_tokens: number of prompts.
        width: their width, by default that of the tower.
        projection: the width in v where prompts are projected to that of tokens; by default that of the first block,
            which in the authors' code bounds those of every stage.
    """
    height, breadth = tower.patch_size
    width = width or tower.width
    bound = math.sqrt(6 / (3 * height * breadth + (projection or tower.blocks[0].width)))
    return torch.empty(num_tokens, width).uniform_(-bound, bound)


class EnteringTokens(nn.Module):
    """Inserts tokens after the prefix tokens: [prefix; tokens; patches].

    Args:
        num_tokens: number of tokens.
        at: number of prefix tokens.
        spanning: whether they stay for several blocks.
    """

    stackable = True

    def __init__(self, num_tokens: int, at: int, spanning: bool):
        super().__init__()
        self.num_tokens = num_tokens
        self.at = at
        self.order = Order.ENTER_SPAN if spanning else Order.ENTER

    @abstractmethod
    def prompts_for(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens (1 or batch, num_tokens, width) for a batch x (batch, tokens, width), in its precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to (batch, tokens + num_tokens, width)."""
        prompts = self.prompts_for(x).expand(x.shape[0], -1, -1)
        return torch.cat((x[:, : self.at], prompts, x[:, self.at :]), dim=1)


class Prompts(EnteringTokens):
    """Inserts learned tokens after the prefix tokens: [prefix; dropout(projection(P)); patches].

    P (num_tokens, width) carries no position. It is shared by the batch; its dropout is drawn for each sample.
    """

    def __init__(self, prompts: torch.Tensor, at: int, dropout: float, projection: nn.Linear | None, spanning: bool):
        super().__init__(len(prompts), at, spanning)
        self.prompts = nn.Parameter(prompts)
        self.dropout = nn.Dropout(dropout)
        self._projection = (projection,)  # in a tuple, because the adapter owns it once for all blocks

    def prompts_for(self, x: torch.Tensor) -> torch.Tensor:
        """The prompts (1, num_tokens, width) of a batch x, or (batch, num_tokens, width) where dropout is drawn."""
        (projection,) = self._projection
        prompts = self.prompts if projection is None else projection(self.prompts)
        drawn = self.training and self.dropout.p > 0
        return self.dropout(prompts.expand(x.shape[0] if drawn else 1, -1, -1)).to(x.dtype)


class RemovePrompts(nn.Module):
    """Removes the `num_tokens` tokens after the prefix tokens."""

    stackable = True

    def __init__(self, num_tokens: int, at: int, spanning: bool):
        super().__init__()
        self.num_tokens = num_tokens
        self.at = at
        self.order = Order.LEAVE_SPAN if spanning else Order.LEAVE

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens + num_tokens, width) to (batch, tokens, width)."""
        return torch.cat((x[:, : self.at], x[:, self.at + self.num_tokens :]), dim=1)
