"""A change of a weight that has no cheaper form than itself: made whole, from few trained values, in every forward."""

from abc import abstractmethod

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.quantised import full_precision
from visionpeft.methods.parts.base import to_parameter_dtype
from visionpeft.sites import Order


class WeightChange(nn.Module):
    """y + dW x for a linear layer y = W x + b, with dW (out, in) in the precision of the trained values, or of W.

    dW and its gradient are formed whole, and the input is kept for it: a step costs more than one of LoRA.
    """

    order = Order.WEIGHT

    @abstractmethod
    def change(self, like: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """dW (out, in) in the precision of `like`, given the weight of the layer in that precision."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (..., in) and output y (..., out) of the layer to the changed output (..., out)."""
        weight = full_precision(weight)
        like = next(self.parameters(), weight)
        with torch.autocast(x.device.type, enabled=False):  # rounded once, when it is multiplied, and not on the way
            change = self.change(like, weight.to(like.dtype))
        return y + F.linear(to_parameter_dtype(x, change), change).to(y.dtype)

    def merge(self, weight: torch.Tensor, bias):
        """Weight and bias that compute the same: W + dW and b."""
        return weight + self.change(weight, weight), bias
