"""Pyramids of five maps, the finest first: of one map of a plain backbone, or of the last stages of one in stages."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn
from torchvision.ops import FeaturePyramidNetwork

from visionpeft.heads.base import stage_norms

LEVELS = 5


class SimplePyramid(nn.Module):
    """Five maps of one: the simple feature pyramid of ViTDet.

    With D `channels` and w `width`, a level of 4 x 4 places for each of the map is conv_transpose 2 x 2 D -> D/2, layer
    norm over channels, GELU, conv_transpose 2 x 2 D/2 -> D/4; of 2 x 2 conv_transpose 2 x 2 D -> D/2; of 1 the map
    itself; of 1/2 its maxima over 2 x 2. Each goes through conv 1 x 1 -> w, layer norm, conv 3 x 3 w -> w, layer norm,
    both without bias. Coarser levels are every second place of the one before. Initialisations are PyTorch's. From 4
    x 4 places on there are 5,560,000 values for D = 768, w = 256.

    Li, Mao, Girshick, He 2022, "Exploring Plain Vision Transformer Backbones for Object Detection" (arXiv 2203.16527).

    Args:
        channels: D.
        width: w.
        finest: places in a row of the finest level for each of the map's: 4, 2 or 1.
    """

    def __init__(self, channels: int, width: int, finest: int):
        super().__init__()
        self.out_channels = width  # which torchvision asks for
        half, quarter = channels // 2, channels // 4
        steps = {
            4: nn.Sequential(
                *(nn.ConvTranspose2d(channels, half, 2, 2), LayerNorm2d(half), nn.GELU()),
                nn.ConvTranspose2d(half, quarter, 2, 2),
            ),
            2: nn.ConvTranspose2d(channels, half, 2, 2),
            1: nn.Identity(),
            0.5: nn.MaxPool2d(2, 2, ceil_mode=True),
        }
        given = {4: quarter, 2: half, 1: channels, 0.5: channels}
        made = [scale for scale in steps if scale <= finest]
        self.scales = [finest / 2**level for level in range(LEVELS)]  # places in a row for one of the map
        self.resample = nn.ModuleList(steps[scale] for scale in made)
        self.levels = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(given[scale], width, 1, bias=False), LayerNorm2d(width)),
                *(nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width)),
            )
            for scale in made
        )

    def forward(self, maps: torch.Tensor) -> "OrderedDict[str, torch.Tensor]":
        """(batch, channels, rows, columns) -> five maps (batch, width, ...), the finest first, named "0" to "4"."""
        levels = [level(step(maps)) for step, level in zip(self.resample, self.levels, strict=True)]
        while len(levels) < LEVELS:
            levels.append(F.max_pool2d(levels[-1], 1, 2))
        return OrderedDict((str(number), level) for number, level in enumerate(levels))

    def strides(self, patch: int) -> list[float]:
        """Pixels from one place of each level to the next."""
        return [patch / scale for scale in self.scales]


class StagePyramid(nn.Module):
    """Five maps of the last stages of a backbone: a feature pyramid network.

    Each map goes through a layer normalisation over its channels, which is new, and conv 1 x 1 to w = `width`; from the
    coarsest on each is doubled by repeating places and added to the next, then conv 3 x 3 w -> w, as torchvision has
    it. Coarser levels are every second place of the one before, as where regions are proposed, or 3 x 3 convolutions of
    stride 2 of it, with a ReLU before all but the first, as in FCOS. W ~ U(-a, a) with a^2 = 3 / inputs, b = 0. With S
    the sum of the channels of n maps there are 2 S + w S + n (9 w^2 + 2 w) values, and 9 w^2 + w for each convolution.

    Lin et al. 2016, "Feature Pyramid Networks" (arXiv 1612.03144); the norms are those of the code that Swin and
    ConvNeXt are published with for detection.

    Args:
        channels: of each map, the finest first.
        width: w.
        finest: places of the finest level in a row of a place of the last map but one: 4, 2 or 1.
        convolved: whether coarser levels are convolutions.
    """

    def __init__(self, channels: Sequence[int], width: int, finest: int, convolved: bool):
        super().__init__()
        self.out_channels = width  # which torchvision asks for
        self.scales = [finest / 2**level for level in range(LEVELS)]  # places in a row for one of the last map but one
        self.norms = stage_norms(channels)
        self.pyramid = FeaturePyramidNetwork(list(channels), width)
        more = LEVELS - len(channels)
        self.coarser = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride=2, padding=1) if convolved else nn.MaxPool2d(1, 2) for _ in range(more)
        )
        for layer in self.coarser if convolved else ():
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        self.convolved = convolved

    def forward(self, maps: list[torch.Tensor]) -> "OrderedDict[str, torch.Tensor]":
        """Maps (batch, channels, rows, columns) -> five (batch, width, ...), the finest first, named "0" to "4"."""
        normed = [norm(each) for norm, each in zip(self.norms, maps, strict=True)]
        levels = list(self.pyramid(OrderedDict((str(number), each) for number, each in enumerate(normed))).values())
        for number, coarser in enumerate(self.coarser):
            levels.append(coarser(F.relu(levels[-1]) if self.convolved and number else levels[-1]))
        return OrderedDict((str(number), level) for number, level in enumerate(levels))

    def strides(self, patch: int) -> list[float]:
        """Pixels from one place of each level to the next, where they are `patch` in the last map but one."""
        return [patch / scale for scale in self.scales]
