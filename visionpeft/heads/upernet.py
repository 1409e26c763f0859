"""UPerNet: pyramid pooling and a feature pyramid, on four stages or on maps of a plain ViT at four resolutions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from visionpeft.errors import ConfigurationError
from visionpeft.heads.base import DenseHead, DenseModule, Layers, checked_share, stage_norms

POOLS = (1, 2, 3, 6)


@dataclass(frozen=True)
class UPerNet(DenseHead):
    """Four maps at 4, 2, 1 and 1/2 times the patches' resolution, pooled, added from coarse to fine, and fused.

    Maps of four stages have their resolutions already, and are only normalised, as in the papers of Swin and ConvNeXt.
    Of a plain ViT they are made by the neck of BEiT and MAE: the first map goes through a transposed convolution
    (2 x 2, stride 2), batch normalisation, GELU and another one, the second through one, the third stays, the fourth is
    halved by its maxima.
    Then with C = `width`, each convolution without bias and followed by batch normalisation and ReLU: the fourth map is
    averaged over grids of 1, 2, 3 and 6 cells, 1 x 1 to C each, resized, joined with the map and 3 x 3 to C; the others
    go 1 x 1 to C; from the coarsest on each is resized and added to the next, then 3 x 3; all are resized to the first,
    joined, 3 x 3 to C, dropout, 1 x 1 to K classes. Resizing is bilinear. With D channels:
    12 D^2 + 5 D of the neck, C (16 D + 99 C + 24) + K (C + 1) of the head; of stages with D_1 to D_4 channels and their
    sum S, 2 S of the norms and C (S + 12 D_4 + 99 C + 24) + K (C + 1) of the head. The auxiliary head is left out.
    Initialisations are PyTorch's.

    Xiao et al. 2018, "Unified Perceptual Parsing for Scene Understanding" (arXiv 1807.10221); Bao et al. 2021, "BEiT"
    (arXiv 2106.08254) for the neck. Papers have a width of 512: 32 M values, a hundred times those of an adapter.

    Args:
        layers: see `DenseHead`; four.
        width: C.
        dropout: share of channels that are dropped while training.
    """

    number_of_maps = 4
    layers: Layers = "quarters"
    width: int = 256
    dropout: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        checked_share(self, "dropout")
        if self.width < 1:
            raise ConfigurationError(f"UPerNet: width must be at least 1, not {self.width}")

    def build(self, channels: int, maps: int, num_classes: int) -> DenseModule:
        """The head for four maps of so many channels, newly initialised."""
        return _UPerNet([channels] * maps, num_classes, self.width, self.dropout, _neck(channels))

    def build_on_stages(self, channels: Sequence[int], num_classes: int) -> DenseModule:
        """The head for maps of four stages with these channels, newly initialised."""
        return _UPerNet(channels, num_classes, self.width, self.dropout, stage_norms(channels))


class _UPerNet(DenseModule):
    needs_several_images = True  # one cell of an image alone has no variance

    def __init__(self, channels: Sequence[int], num_classes: int, width: int, dropout: float, neck: nn.ModuleList):
        super().__init__()
        *finer, coarsest = channels
        self.neck = neck
        self.pools = nn.ModuleList(_convolution(coarsest, width, 1) for _ in POOLS)
        self.pooled = _convolution(coarsest + len(POOLS) * width, width, 3)
        self.lateral = nn.ModuleList(_convolution(each, width, 1) for each in finer)
        self.smooth = nn.ModuleList(_convolution(width, width, 3) for _ in range(3))
        self.fuse = _convolution(4 * width, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        maps = maps.unbind(1) if isinstance(maps, torch.Tensor) else maps
        *fine, coarse = (level(x) for level, x in zip(self.neck, maps, strict=True))
        size = coarse.shape[-2:]
        pools = [
            _to(pool(F.adaptive_avg_pool2d(coarse, cells)), size) for pool, cells in zip(self.pools, POOLS, strict=True)
        ]
        levels = [*(lateral(x) for lateral, x in zip(self.lateral, fine, strict=True))]
        levels.append(self.pooled(torch.cat([coarse, *pools], dim=1)))
        for index in (2, 1, 0):
            levels[index] = levels[index] + _to(levels[index + 1], levels[index].shape[-2:])
        smooth = [*(layer(x) for layer, x in zip(self.smooth, levels[:3], strict=True)), levels[3]]
        joined = torch.cat([_to(x, smooth[0].shape[-2:]) for x in smooth], dim=1)
        return self.classify(self.dropout(self.fuse(joined)))


def _neck(channels: int) -> nn.ModuleList:
    """What brings four maps to 4, 2, 1 and 1/2 times their resolution."""
    twice = [nn.ConvTranspose2d(channels, channels, 2, stride=2) for _ in range(3)]
    return nn.ModuleList([
        nn.Sequential(twice[0], nn.BatchNorm2d(channels), nn.GELU(), twice[1]),
        twice[2],
        nn.Identity(),
        nn.MaxPool2d(2, ceil_mode=True),
    ])  # fmt: skip


def _convolution(channels: int, width: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, size, padding=size // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    )


def _to(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(x, size=size, mode="bilinear")
