"""Prompts that travel through blocks, made by a source and changed by further ones on their way.

With x_P what the block before has made of the prompts, and P_l those of block l, before block l they become

    x_P <- keep * x_P + add * P_l.

| method | keep | add | P_l |
| --- | --- | --- | --- |
| `VPT(deep=False)` | 1 | 0 | learned, in the first block alone |
| `VPT(deep=True)` | 0 | 1 | learned |
| prefix-propagation | 1 | 1 | learned |
| the image prompts of ProVP-Ref | 0.01 | 0.99 | learned |
| SPT, selective prompt tuning | 1 - g_l | g_l | learned, g_l a gate of the block |
| IDPG | 1 | 1 | made from the class token before block l |
| LPT | 1 | 0 | made from the class token before one block in the middle, in that block alone |

The prompts of the first block enter as they are. A source is a module `source(x, first) -> tokens` that maps the tokens
x (batch, tokens, width) before a block, whose patches begin at index `first`, to (1 or batch, num_tokens, width).
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.prompts import EnteringTokens, RemovePrompts
from visionpeft.sites import Placement


class LearnedPrompts(nn.Module):
    """A source of learned prompts (num_tokens, width); its dropout is drawn for each sample."""

    def __init__(self, prompts: torch.Tensor, dropout: float = 0.0):
        super().__init__()
        self.prompts = nn.Parameter(prompts)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """The prompts (1, num_tokens, width), or (batch, num_tokens, width) where dropout is drawn."""
        drawn = self.training and self.dropout.p > 0
        return self.dropout(self.prompts.expand(x.shape[0] if drawn else 1, -1, -1))


class FromSource(EnteringTokens):
    """Inserts the tokens of a source after the prefix tokens."""

    def __init__(self, source: nn.Module, num_tokens: int, at: int):
        super().__init__(num_tokens, at, spanning=True)
        self.source = source

    @property
    def reads_all_patches(self) -> bool:
        """Whether the source does."""
        return getattr(self.source, "reads_all_patches", False)

    def prompts_for(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens (1 or batch, num_tokens, width) for a batch x (batch, tokens, width), in its precision."""
        return self.source(x, self.at).to(x.dtype)


class Propagation(nn.Module):
    """Before a block, x_P <- keep * x_P + add * source(x) for prompts x_P that are on their way; the rest stays."""

    stackable = True

    def __init__(self, source: nn.Module, prompts: FromSource, keep: float, add: float):
        super().__init__()
        self.source = source
        self.keep = keep
        self.add = add
        self._prompts = (prompts,)  # in a tuple, because it has its own place in the adapter

    @property
    def reads_all_patches(self) -> bool:
        """Whether the source does."""
        return getattr(self.source, "reads_all_patches", False)

    @property
    def located_at(self) -> FromSource:
        """The module whose prompts it changes."""
        return self._prompts[0]

    def forward(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """Map tokens (batch, tokens, width), the first prompt of them at index `first`, to the same shape."""
        stop = first + self.located_at.num_tokens
        changed = self.keep * x[:, first:stop] + (self.add * self.source(x, stop)).to(x.dtype)
        return torch.cat((x[:, :first], changed, x[:, stop:]), dim=1)


def travelling(
    method: Method,
    tower: Tower,
    blocks: Sequence[int],
    sources: Sequence[nn.Module],
    num_tokens: int,
    keep: float = 1.0,
    add: float = 0.0,
) -> Iterator[Placement]:
    """Prompts that enter the first of consecutive blocks, are changed before the others, and leave after the last.

    Args:
        method: whose prompts they are, for the error.
        tower: the tower.
        blocks: the blocks, ascending.
        sources: one for each block, or one alone for prompts that nothing changes on their way; the first gives the
            prompts that enter.
        num_tokens: number of prompts.
        keep: factor of what the block before has made of them.
        add: factor of what the source of a block gives.

    Raises:
        ConfigurationError: if the blocks are not consecutive.
    """
    consecutive = list(blocks) == list(range(blocks[0], blocks[-1] + 1))
    require(consecutive, method, f"its prompts travel through consecutive blocks, not through blocks {list(blocks)}")
    at = tower.num_prefix_tokens
    enter = FromSource(sources[0], num_tokens, at)
    yield Placement(tower.name, blocks[0], "stream_in", enter)
    for index, source in zip(blocks[1:], sources[1:], strict=len(sources) > 1):
        yield Placement(tower.name, index, "stream_in", Propagation(source, enter, keep, add))
    yield Placement(tower.name, blocks[-1], "stream_out", RemovePrompts(num_tokens, at, spanning=True))


def summary(x: torch.Tensor, class_token: bool, first: int) -> torch.Tensor:
    """What stands for an image (batch, width) among its tokens x: the class token, or without one the mean patch.

    Args:
        x: tokens (batch, tokens, width).
        class_token: whether the first of them is the class token; register tokens alone stand for nothing.
        first: index of the first patch.
    """
    return x[:, 0] if class_token else x[:, first:].mean(dim=1)
