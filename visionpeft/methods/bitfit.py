"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models (Ben Zaken et al., 2022).

https://arxiv.org/abs/2106.10199
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require_same, weighted_sum
from visionpeft.sites import Order, Placement


class Shift(nn.Module):
    """y + shift on the channels of a layer's output: its bias is b + shift; (out,), zero at the start."""

    stackable = True
    on_images = True
    order = Order.WEIGHT

    def __init__(self, layer: Layer):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(layer.out_features))
        self.trailing = layer.trailing

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map the layer's output y, channels last or (batch, out, h, w), to the same shape."""
        return (y + self.shift.view(-1, *self.trailing)).to(y.dtype)

    def merge(self, weight: torch.Tensor, bias: torch.Tensor):
        """Weight and bias that compute the same: W and b + shift."""
        return weight, bias + self.shift.to(bias)


@dataclass(frozen=True)
class BitFit(Method):
    """Trains every bias of the backbone, those of the norms and of the patch embedding included.

    A bias of a layer is b + shift with the frozen b and a trained shift that starts at zero; biases of pooling layers
    are trained themselves. Learned position biases are not biases in this sense. Mergeable.
    Trainable on ViT-B/16 and on the ViT-B/16 tower of CLIP: 11 D L + 2 D = 102,912. The key bias is among them in the
    paper, although it adds the same to all scores of a query and so has a zero gradient (unless keys are rotated or
    normalised); without it: 93,696. In some blocks alone, those of their layers and norms: 11 D for each block.
    Source: Ben Zaken et al., BitFit, 2022.

    Args:
        key_bias: whether to count and train the key bias. The bias of a key normalisation is trained in any case,
            although without rotation its gradient is zero, too.
        blocks: which blocks, such as "last:4" or a list of indices; "all" has what is outside of blocks, too.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    key_bias: bool = True
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `Shift` after every layer that has a bias."""
        everything, blocks = self.blocks == "all", blocks_of(self, tower)
        for index, layer in tower.all_layers():
            if not everything and index not in blocks:
                continue
            if layer.bias_tensor is not None and (self.key_bias or layer.site != "k"):
                yield Placement(tower.name, index, layer.site, Shift(layer))

    def combine(self, methods, parts, weights):
        """The weighted sum of the shifts."""
        require_same(methods)
        return self, weighted_sum(parts, weights)

    def trains(self, tower: Tower) -> Iterator[str]:
        """Biases outside the described layers, such as those of attention pooling, if all blocks are meant."""
        if self.blocks != "all":
            return
        described = {id(getattr(b.bias_owner, b.bias)) for _, b in tower.all_layers() if b.bias_owner is not None}
        for name in tower.parameter_names():
            if name.endswith("bias") and id(tower.module.get_parameter(name)) not in described:
                yield name
