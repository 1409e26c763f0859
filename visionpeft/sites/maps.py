"""Blocks whose tokens are the pixels of a map: what acts in them sees (batch, rows * columns, width), row by row."""

from collections.abc import Sequence

import torch
from torch import nn

from visionpeft.sites.blocks import Flow, Located, OnPatches, Sites


class MapFlow(Flow):
    """One pass of a map through one block.

    A map at which nothing acts is given back as it is.

    Args:
        sites: those of the block.
        grid: rows and columns of the map.
        channels_first: whether maps are (batch, width, rows, columns), or else (batch, rows, columns, width).
    """

    def __init__(self, sites: Sites, grid: Sequence[int], channels_first: bool = False):
        super().__init__(sites)
        self.grid = tuple(grid)
        self.channels_first = channels_first

    def __call__(self, site: str, x: torch.Tensor, channels_first: bool | None = None) -> torch.Tensor:
        """What a `Flow` does with tokens, with the pixels of the map x, which may lie otherwise than others, or be
        (batch, rows * columns, width) already.
        """
        if not (site in self.carried or site in self.sites.acting or site in self.sites.branches):
            return x
        if x.ndim == 3:
            return super().__call__(site, x)
        channels_first = self.channels_first if channels_first is None else channels_first
        pixels = x.permute(0, 2, 3, 1) if channels_first else x
        tokens = super().__call__(site, pixels.flatten(1, 2)).unflatten(1, self.grid)
        if not channels_first:
            return tokens
        # In the order in memory that it had: convolutions of another order may round differently.
        return tokens.permute(0, 3, 1, 2).contiguous(memory_format=memory_format(x))

    def act(self, module: nn.Module | OnPatches | Located, x: torch.Tensor) -> torch.Tensor:
        """Let a module act on pixels x (batch, rows * columns, width), and tell it of the grid if it reads that."""
        return module(x, self.grid) if getattr(module, "reads_grid", False) else module(x)


class OnPixels:
    """Lets a module that acts on tokens act on a map (batch, width, rows, columns).

    Args:
        module: maps tokens (batch, rows, columns, width) to the same shape.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map a map to the same shape."""
        return self.module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous(memory_format=memory_format(x))


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """How the values of a map (batch, width, rows, columns) lie in memory."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
