"""Several low-rank changes of one layer, each weighed for every token by itself."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.methods.parts.base import to_parameter_dtype
from visionpeft.sites import Order


class LowRankExperts(nn.Module):
    """y + scaling * sum_e p_e B_e A_e dropout(x) for a linear layer y = W x + b and shares p of the experts.

    A (experts, rank, in) is N(0, std), or without `std` Kaiming-uniform with a = sqrt(5); B (experts, out, rank) is
    zero: no change at the start.
    """

    order = Order.WEIGHT
    output_side = ("B",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        experts: int,
        rank: int,
        scaling: float,
        dropout: float,
        std: float | None = None,
    ):
        super().__init__()
        self.A = nn.Parameter(torch.empty(experts, rank, in_features))
        self.B = nn.Parameter(torch.zeros(experts, out_features, rank))
        if std is None:
            nn.init.kaiming_uniform_(self.A.data.flatten(0, 1), a=math.sqrt(5))
        else:
            nn.init.normal_(self.A, std=std)
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)

    def changed(self, x: torch.Tensor, y: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Map input x (..., in), output y (..., out) and shares (..., experts) to the changed output (..., out)."""
        # All experts are one low-rank change, whose parts the shares scale where they are narrow.
        x = self.dropout(to_parameter_dtype(x, self.A))
        z = F.linear(x, self.A.flatten(0, 1)).unflatten(-1, self.A.shape[:2])
        z = self.scaling * shares[..., None] * z
        return y + F.linear(z.flatten(-2), self.B.transpose(0, 1).flatten(1)).to(y.dtype)
