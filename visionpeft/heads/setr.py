"""The heads of SETR, which VPT's paper uses on ADE20K."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from visionpeft.errors import ConfigurationError
from visionpeft.heads.base import DenseHead, DenseModule, Layers


@dataclass(frozen=True)
class SETR(DenseHead):
    """Convolutions on the last block's map, naive or with progressive upsampling.

    A layer normalisation over the channels D precedes both. With w = `width` and K classes:
        "naive": conv 1 x 1 D -> w, batch normalisation, ReLU, conv 1 x 1 w -> K;
        D (w + 2) + 3 w + K (w + 1) values.
        "pup": three times [conv 3 x 3, batch normalisation, ReLU, bilinear x 2] from D to w channels, one more without
        the upsampling, conv 1 x 1 w -> K; 9 w (D + 3 w) + 2 D + 12 w + K (w + 1) values. The logits have 8 x 8 places
        for each patch; the resizing that follows is the fourth upsampling of the paper for patches of 16 x 16 pixels.
    Initialisations are PyTorch's. The paper's auxiliary heads on earlier blocks are left out.

    Zheng et al. 2021, "Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective with Transformers"
    (arXiv 2012.15840); Jia et al. 2022, "Visual Prompt Tuning" (arXiv 2203.12119) for its use with prompts.

    Args:
        layers: see `DenseHead`; one.
        kind: "naive" or "pup".
        width: w.
    """

    number_of_maps = 1
    layers: Layers = 1
    kind: Literal["naive", "pup"] = "pup"
    width: int = 256

    def __post_init__(self):
        super().__post_init__()
        if self.kind not in ("naive", "pup"):
            raise ConfigurationError(f"SETR: kind must be naive or pup, not {self.kind!r}")
        if self.width < 1:
            raise ConfigurationError(f"SETR: width must be at least 1, not {self.width}")

    def build(self, channels: int, maps: int, num_classes: int) -> DenseModule:
        """The head for one map of so many channels, newly initialised."""
        return _SETR(channels, num_classes, self.kind, self.width)


class _SETR(DenseModule):
    def __init__(self, channels: int, num_classes: int, kind: str, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        size, steps = (1, 1) if kind == "naive" else (3, 4)
        self.steps = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width if step else channels, width, size, padding=size // 2), nn.BatchNorm2d(width), nn.ReLU()
            )
            for step in range(steps)
        )
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        x = self.norm(maps.squeeze(1).movedim(1, -1)).movedim(-1, 1)
        for number, step in enumerate(self.steps):
            if number:
                x = F.interpolate(x, scale_factor=2, mode="bilinear")
            x = step(x)
        return self.classify(x)
