"""Scaling & Shifting Your Features (Lian et al., 2022), https://arxiv.org/abs/2210.08823."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require
from visionpeft.sites import Order, Placement
from visionpeft.sites.frozen_layers import scale_shift, shares_memory

TARGETS = ("norm1", "expand", "q", "k", "v", "proj", "conv_dw", "norm2", "fc1", "fc2")
# and of the layers outside the blocks, besides the final norms and those between stages
EMBEDDING = ("patch_embed", "patch_embed_norm")


class ScaleShift(nn.Module):
    """scale * y + shift on the channels of a layer's output; both (out,)."""

    on_images = True
    order = Order.OUTPUT

    def __init__(self, layer: Layer, std: float):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(layer.out_features).normal_(1.0, std))
        self.shift = nn.Parameter(torch.empty(layer.out_features).normal_(0.0, std))
        self.trailing = layer.trailing
        self.overwritten = layer.overwritten

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map the layer's output y, channels last or (batch, out, h, w), to the same shape."""
        if self.trailing:
            return (y * self.scale.view(-1, 1, 1) + self.shift.view(-1, 1, 1)).to(y.dtype)
        if self.overwritten:
            return (y * self.scale + self.shift).to(y.dtype)
        return scale_shift(y, self.scale, self.shift)

    def row_values(self) -> dict[str, torch.Tensor]:
        """Scale and shift."""
        return {"scale": self.scale, "shift": self.shift}

    def by_row(self, values: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """What `forward` gives, with a scale and shift (rows, out) of each row."""
        shape = (len(y), -1, 1, 1) if self.trailing else (len(y), *(1,) * (y.ndim - 2), -1)
        scale, shift = values["scale"].view(shape), values["shift"].view(shape)
        # Without gradients the output of the layer is read by nobody else, unless it is the input itself.
        in_place = not torch.is_grad_enabled() and y.dtype == scale.dtype and not shares_memory(x, y)
        return torch.addcmul(shift, y.to(scale.dtype), scale, out=y if in_place else None).to(y.dtype)

    def merge(self, weight: torch.Tensor, bias: torch.Tensor | None):
        """Weight and bias that compute the same: diag(scale) W and scale * b + shift."""
        scale, shift = self.scale.to(weight), self.shift.to(weight)
        return weight * scale.view(-1, *(1,) * (weight.ndim - 1)), shift if bias is None else scale * bias + shift


@dataclass(frozen=True)
class SSF(Method):
    """Scale and shift of features: gamma * y + beta on every channel of the output y of a layer.

    Acts after both norms, q, k, v, proj, fc1 (before the activation) and fc2 of every block, after the patch
    embedding (with the first block) and after the final norm (with the last block); where there are stages, also after
    the norm of the patch embedding, the depth-wise convolution of a block (ConvNeXt), the layer that widens the stream
    in one (Hiera), and the norms, reductions and convolutions between stages (with the next block).
    gamma ~ N(1, std), beta ~ N(0, std), so the start is near the backbone, not equal to it. Mergeable.
    On a model that has layer sites only: after every norm, and every linear layer and convolution with a bias (one
    without is followed by a norm), those outside the blocks where `blocks` are all.
    Trainable on ViT-B/16: 22 D L + 4 D = 205,824.
    Source: Lian et al., Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning, 2022.

    Args:
        std: standard deviation of both initialisations.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    std: float = 0.02
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.std >= 0, self, f"std must not be negative, but is {self.std}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `ScaleShift` after every layer named above."""
        blocks = blocks_of(self, tower)
        for index, layer in tower.all_layers():
            if tower.layers_only is not None:
                holds = layer.bias_tensor is not None
                acts = holds and (len(blocks) == tower.depth if index is None else index in blocks)
            elif index is None:
                named = layer.site in (*EMBEDDING, *tower.final_norms) or tower.between_stages(layer.site) is not None
                acts = named and tower.belongs_to(layer.site) in blocks
            else:
                acts = layer.target in TARGETS and index in blocks
            if acts:
                yield Placement(tower.name, index, layer.site, ScaleShift(layer, self.std))
