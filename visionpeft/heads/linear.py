"""The linear head of DINOv2 and DINOv3, on one block or on several."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from visionpeft.heads.base import DenseHead, DenseModule, Layers, checked_share, stage_norms


@dataclass(frozen=True)
class LinearSegmentation(DenseHead):
    """y = W BN(dropout(x)) + b at each patch; x (maps * channels) holds the patch in all maps that are read.

    With `layers=1` the linear head on the last block, with `layers=4` or "quarters" the head on four. BN is a batch
    normalisation with scale and shift over batch and places, dropout takes whole channels. W ~ N(0, 0.01^2), b = 0.
    C (K + 2) + K values for C = maps * channels and K classes; without batch normalisation C K + K. Maps of stages are
    first normalised, which takes 2 C values more, and resized bilinearly to the finest; C is the sum of their channels.

    Oquab et al. 2023, "DINOv2" (arXiv 2304.07193), appendix; the order, dropout first, is that of DINOv3's code.

    Args:
        layers: see `DenseHead`.
        batch_norm: whether there is the batch normalisation.
        dropout: share of channels that are dropped while training.
    """

    layers: Layers = 1
    batch_norm: bool = True
    dropout: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        checked_share(self, "dropout")

    def build(self, channels: int, maps: int, num_classes: int) -> DenseModule:
        """The head for so many maps of so many channels, newly initialised."""
        return _Linear(channels * maps, num_classes, self.batch_norm, self.dropout)

    def build_on_stages(self, channels: Sequence[int], num_classes: int) -> DenseModule:
        """The head for maps of stages with these channels, newly initialised."""
        return _LinearOnStages(channels, num_classes, self.batch_norm, self.dropout)


class _Linear(DenseModule):
    def __init__(self, channels: int, num_classes: int, batch_norm: bool, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.norm = nn.BatchNorm2d(channels) if batch_norm else nn.Identity()
        self.classify = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.classify(self.norm(self.dropout(maps.flatten(1, 2))))


class _LinearOnStages(_Linear):
    def __init__(self, channels: Sequence[int], num_classes: int, batch_norm: bool, dropout: float):
        super().__init__(sum(channels), num_classes, batch_norm, dropout)
        self.norms = stage_norms(channels)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        size = maps[0].shape[-2:]
        normed = (norm(each) for norm, each in zip(self.norms, maps, strict=True))
        joined = torch.cat([F.interpolate(each, size=size, mode="bilinear") for each in normed], dim=1)
        return super().forward(joined[:, None])
