"""A change of the weight and bias of a linear layer, a patch convolution or a LayerNorm, added to what it computes."""

from abc import abstractmethod

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.layer import Layer
from visionpeft.sites import Order


class LayerDelta(nn.Module):
    """A layer whose weight is W + D and whose bias is b + d.

    A subclass has `dense`, and the tensors `weight` and `bias`, each None where it changes no such part, or `has`. The
    product is made with W + D, under autocast rounded as one like a trained weight; where the precision of W is another
    than that of D, D gets a product of its own.

    Args:
        layer: a linear layer, a patch convolution or a LayerNorm.
    """

    order = Order.WEIGHT

    def __init__(self, layer: Layer):
        super().__init__()
        self.shape = tuple(layer.weight_tensor.shape)
        self.kind = layer.kind
        self.eps = layer.owner.eps if layer.kind == "norm" else None
        self.trailing = layer.trailing
        names = ("stride", "padding", "dilation", "groups") if layer.kind == "conv" else ()
        self.geometry = {name: getattr(layer.owner, name) for name in names}

    @abstractmethod
    def dense(self, part: str) -> torch.Tensor:
        """D or d as a tensor like the weight or bias."""

    def has(self, part: str) -> bool:
        """Whether it changes the weight, or the bias."""
        return getattr(self, part) is not None

    @property
    def precision(self) -> torch.dtype:
        """That of its values."""
        return (self.bias if self.weight is None else self.weight).dtype

    def acting(self, part: str) -> torch.Tensor:
        """What acts in a forward pass: `dense`, unless a subclass draws something."""
        return self.dense(part)

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (..., in) and output y (..., out) of the layer to the changed output (..., out).

        Of a convolution, x is (batch, in, H, W) and y (batch, out, h, w).
        """
        if self.has("weight"):
            dtype = y.dtype if torch.is_autocast_enabled(x.device.type) else self.precision
            y = y + self.product(x, dtype).to(y.dtype)
        return (y + self.acting("bias").view(-1, *self.trailing)).to(y.dtype) if self.has("bias") else y

    def sparse_change(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] | None:
        """Values and flat indices of D, and d, of a linear layer whose D is sparse; None for any other.

        It is here, beside `forward`, because what a module says of itself counts for that `forward` alone.
        """
        return None

    def product(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """D x, in this precision but for a LayerNorm."""
        change = self.acting("weight")
        if self.kind == "conv":
            return F.conv2d(x.to(dtype), change.to(dtype), **self.geometry)
        if self.eps is None:
            return F.linear(x.to(dtype), change.to(dtype))
        return change * F.layer_norm(x.to(self.precision), self.shape, eps=self.eps)

    def merge(self, weight: torch.Tensor, bias):
        """Weight and bias that compute the same: W + D and b + d."""
        if self.has("weight"):
            weight = weight + self.dense("weight").to(weight)
        return weight, bias + self.dense("bias").to(bias) if self.has("bias") else bias
