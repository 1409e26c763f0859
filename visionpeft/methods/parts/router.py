"""The router that all mixtures share: how much each of several experts counts for an input."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.methods.parts.base import to_parameter_dtype


class Router(nn.Module):
    """p = softmax(W x) over E experts, for every vector x by itself; W (experts, width) is N(0, 0.02), without a bias.

    Args:
        width: length of the vectors that it reads.
        experts: their number E.
    """

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, width) * 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., width) to shares (..., experts), which are positive and add up to 1."""
        return F.linear(to_parameter_dtype(x, self.weight), self.weight).softmax(dim=-1)
