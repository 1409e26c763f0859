"""The head of DPT, without the class token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from visionpeft.errors import ConfigurationError
from visionpeft.heads.base import DenseHead, DenseModule, Layers, checked_share

SHARES = (1, 2, 4, 8)  # widths of the levels, from the finest on, over the first one


@dataclass(frozen=True)
class DPT(DenseHead):
    """Four maps reassembled at 4, 2, 1 and 1/2 times the patches' resolution, fused from coarse to fine.

    With C = `width` and levels of w_i = C (3/8, 3/4, 3/2, 3) channels: each map 1 x 1 from D to w_i; transposed
    convolutions of 4 x 4 and 2 x 2 for the first two, a convolution of 3 x 3 with stride 2 for the last; 3 x 3 without
    bias to C. From the coarsest on, p <- conv1x1(up(r(p + r'(level)))), the first without level, where
    r(x) = x + BN(conv(ReLU(BN(conv(ReLU(x)))))) has two 3 x 3 without bias and up is bilinear to the next level's size
    (the last time x 2) with corners aligned. Then 3 x 3 without bias, batch normalisation, ReLU, dropout, 1 x 1 to K
    classes. The readout of the class token is left out ("ignore" there), as heads are given patches alone.
    Initialisations are PyTorch's.

    Maps of four stages have their resolutions already: they go through the convolutions 3 x 3 to C at once, without a
    norm, as transformers' DPT takes those of SwinV2.

    Ranftl et al. 2021, "Vision Transformers for Dense Prediction" (arXiv 2103.13413); on backbones in stages, recalled
    and not read, Birkl et al. 2023, "MiDaS v3.1" (arXiv 2307.14460).

    Args:
        layers: see `DenseHead`; four.
        width: C, a multiple of 8; 256 in the paper.
        dropout: share of values that are dropped while training.
    """

    number_of_maps = 4
    layers: Layers = "quarters"
    width: int = 256
    dropout: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        checked_share(self, "dropout")
        if self.width < 8 or self.width % 8:
            raise ConfigurationError(f"DPT: width must be a multiple of 8, not {self.width}")

    def build(self, channels: int, maps: int, num_classes: int) -> DenseModule:
        """The head for four maps of so many channels, newly initialised."""
        widths = [3 * self.width * share // 8 for share in SHARES]
        project = [nn.Conv2d(channels, each, 1) for each in widths]
        resample = [
            nn.ConvTranspose2d(widths[0], widths[0], 4, stride=4),
            nn.ConvTranspose2d(widths[1], widths[1], 2, stride=2),
            nn.Identity(),
            nn.Conv2d(widths[3], widths[3], 3, stride=2, padding=1),
        ]
        return _DPT(widths, num_classes, self.width, self.dropout, project, resample)

    def build_on_stages(self, channels: Sequence[int], num_classes: int) -> DenseModule:
        """The head for maps of four stages with these channels, newly initialised."""
        as_they_are = [nn.Identity() for _ in channels]
        return _DPT(channels, num_classes, self.width, self.dropout, as_they_are, as_they_are)


class _DPT(DenseModule):
    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        width: int,
        dropout: float,
        project: Sequence[nn.Module],
        resample: Sequence[nn.Module],
    ):
        super().__init__()
        self.project = nn.ModuleList(project)
        self.resample = nn.ModuleList(resample)
        self.level = nn.ModuleList(nn.Conv2d(each, width, 3, padding=1, bias=False) for each in widths)
        self.fusion = nn.ModuleList(_Fusion(width, level=index < 3) for index in range(4))
        self.before = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(dropout)
        )
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        maps = maps.unbind(1) if isinstance(maps, torch.Tensor) else maps
        steps = zip(self.project, self.resample, self.level, maps, strict=True)
        levels = [level(resample(project(x))) for project, resample, level, x in steps]
        sizes = [tuple(2 * side for side in levels[0].shape[-2:]), *(tuple(x.shape[-2:]) for x in levels[:3])]
        path = None
        for fusion, level, size in reversed(list(zip(self.fusion, levels, sizes, strict=True))):
            path = fusion(level, None, size) if path is None else fusion(path, level, size)
        return self.classify(self.before(path))


class _Fusion(nn.Module):
    def __init__(self, width: int, level: bool):
        super().__init__()
        self.of_level = _Residual(width) if level else None
        self.of_sum = _Residual(width)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, path: torch.Tensor, level: torch.Tensor | None, size: tuple[int, int]) -> torch.Tensor:
        path = path if level is None else path + self.of_level(level)
        return self.out(F.interpolate(self.of_sum(path), size=size, mode="bilinear", align_corners=True))


class _Residual(nn.Sequential):
    def __init__(self, width: int):
        steps = [(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)) for _ in "12"]
        super().__init__(*(layer for step in steps for layer in step))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)
