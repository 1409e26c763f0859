"""Modules that look at what passes through a site, and leave it as it is: how a method is told what its layers read."""

import torch
import torch.nn as nn


class SeenInputs(nn.Module):
    """Adds up x x^T over the tokens x that a linear layer reads."""

    moments: torch.Tensor | None = None
    classes: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Look at the input x (..., in) and leave the output y as it is."""
        x = _at_least_single(x).flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            moments = x.mT @ x
        self.moments = moments if self.moments is None else self.moments + moments
        return y


class SeenTokens(nn.Module):
    """Adds up squares of the channels of patches, for each class."""

    patches_only = True
    classes: torch.Tensor | None = None

    def __init__(self):
        super().__init__()
        self.squares: dict[int, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Look at patches x (batch, patches, channels) and leave them as they are."""
        squares = _at_least_single(x).square().sum(1)
        classes = squares.new_zeros(len(squares)) if self.classes is None else self.classes
        classes = classes.repeat_interleave(len(squares) // len(classes))  # of all frames of a clip
        for label in classes.unique().tolist():
            total = squares[classes == label].sum(0)
            self.squares[label] = self.squares[label] + total if label in self.squares else total
        return x

    def norms(self) -> torch.Tensor:
        """L2 norms (classes, channels)."""
        return torch.stack([*self.squares.values()]).sqrt()


class SeenOutputs(SeenTokens):
    """`SeenTokens` for the output of a layer.

    Args:
        first: number of tokens before the patches.
    """

    patches_only = False

    def __init__(self, first: int):
        super().__init__()
        self.first = first

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Look at the output y (batch, tokens, channels) and leave it as it is."""
        super().forward(y[:, self.first :])
        return y


def _at_least_single(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
