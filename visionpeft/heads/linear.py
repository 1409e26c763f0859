"""The linear head of DINOv2 and DINOv3, on one block or on several."""

from dataclasses import dataclass

import torch
from torch import nn

from visionpeft.heads.base import DenseHead, DenseModule, Layers, checked_share


@dataclass(frozen=True)
class LinearSegmentation(DenseHead):
    """y = W BN(dropout(x)) + b at each patch; x (maps * channels) holds the patch in all maps that are read.

    With `layers=1` the linear head on the last block, with `layers=4` or "quarters" the head on four. BN is a batch
    normalisation with scale and shift over batch and places, dropout takes whole channels. W ~ N(0, 0.01^2), b = 0.
    C (K + 2) + K values for C = maps * channels and K classes; without batch normalisation C K + K.

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
