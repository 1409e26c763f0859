"""5%>100%: Breaking Performance Shackles of Full Fine-Tuning on Visual Recognition Tasks (Yin et al., 2025).

https://arxiv.org/abs/2408.08345
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require, to_parameter_dtype
from visionpeft.methods.parts.grid import as_images, as_patches, grid_in_block
from visionpeft.sites import Placement

KERNELS = (3, 5, 7)
NORM_START = 1e-6


class MultiCognitiveAdapter(nn.Module):
    """x + up(dropout(gelu(M(down(norm_scale * norm(x) + scale * x))))), M over the grid of patches.

    M(z) = z' + pointwise(z') with z' = z + (dw3(z) + dw5(z) + dw7(z)) / 3, three depth-wise convolutions and one of
    1 x 1. Every token before the patches passes them as an image of one pixel: their centres and biases alone.
    norm_scale is 1e-6, scale one, everything else has PyTorch's default.

    Args:
        width: width D of the tokens.
        bottleneck: number h of channels of the convolutions.
        grid: rows and columns of patches; None in a block that tells them at each call.
        dropout: dropout before up.
    """

    stackable = True
    located_at = "patches"
    reads_grid = True

    def __init__(self, width: int, bottleneck: int, grid: tuple[int, int] | None, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.norm_scale = nn.Parameter(torch.full((width,), NORM_START))
        self.scale = nn.Parameter(torch.ones(width))
        self.down = nn.Linear(width, bottleneck)
        self.depthwise = nn.ModuleList(
            nn.Conv2d(bottleneck, bottleneck, kernel, padding=kernel // 2, groups=bottleneck) for kernel in KERNELS
        )
        self.pointwise = nn.Linear(bottleneck, bottleneck)  # a convolution of 1 x 1 sees no neighbours
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(bottleneck, width)
        self.grid = grid

    def forward(self, x: torch.Tensor, first: int, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Map tokens (batch, tokens, width), whose patches begin at index `first`, to the same shape."""
        u = to_parameter_dtype(x, self.scale)
        h = self.down(self.norm_scale * self.norm(u) + self.scale * u)
        z = as_images(h[:, first:], grid or self.grid, "Mona")
        near = as_patches(sum(convolve(z) for convolve in self.depthwise))
        h = h + torch.cat((self._alone(h[:, :first]).to(near.dtype), near), dim=1) / len(KERNELS)
        h = h + self.pointwise(h)
        return x + self.up(self.dropout(F.gelu(h))).to(x.dtype)

    def _alone(self, h: torch.Tensor) -> torch.Tensor:
        """The sum of the depth-wise convolutions of tokens (batch, tokens, channels), each an image of one pixel."""
        centres = sum(
            each.weight[:, 0, size // 2, size // 2] for each, size in zip(self.depthwise, KERNELS, strict=True)
        )
        return centres * h + sum(each.bias for each in self.depthwise)


@dataclass(frozen=True)
class Mona(Method):
    """Adapters that look at patches at three scales, after attention and after MLP: x + up(gelu(M(down(s * x)))).

    They act on the stream x after each residual; what enters down is norm_scale * LayerNorm(x) + scale * x, with a
    trained number for each channel. M adds to its h channels the mean of depth-wise convolutions over 3 x 3, 5 x 5 and
    7 x 7 patches, then a mix of the channels of each patch. The paper's backbones have no class token: here class,
    register and prompt tokens pass the convolutions as images of one pixel, as in `Convpass`. (Without M, nothing would
    read M of the last block in a tower that reads its class token.)
    norm_scale starts at 1e-6, scale at one, everything else as PyTorch has it: not the backbone at the start, as
    published. Not mergeable: it is not linear and mixes patches. It needs the grid of patches: images of another size
    than the model was built for are refused. Models for images of any size need `grid`, towers without patches are
    refused.
    Trainable on L blocks of width D: 2 L (2 D h + h + 5 D + h^2 + 87 h); 2,684,928 on ViT-B/16 for h = 64, which is
    large beside other adapters on a ViT: 8 to 32 are worth a try. Published for Swin alone, so that no number of the
    paper is about a ViT. In the published code the argument `factor` has no effect, and h is 64 for every width.
    Source: Yin et al., 5%>100%: Breaking Performance Shackles of Full Fine-Tuning on Visual Recognition Tasks, 2025,
    and the authors' code.

    Args:
        bottleneck: number h of channels.
        dropout: dropout before up; 0.1 in the authors' code.
        grid: rows and columns of patches, for a model that takes images of any size; None for the model's own.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers; by default the image tower.
    """

    bottleneck: int = 64
    dropout: float = 0.1
    grid: tuple[int, int] | None = None
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.bottleneck > 0, self, "bottleneck must be a positive integer")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        positive = all(n > 0 for n in self.grid or ())
        require(positive, self, f"grid must be rows and columns of patches, not {self.grid!r}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """Two `MultiCognitiveAdapter` in every chosen block."""
        for index in blocks_of(self, tower):
            grid, width = grid_in_block(self, tower, index), tower.blocks[index].width
            for site in filter(tower.blocks[index].has, ("stream_mid", "stream_out")):
                module = MultiCognitiveAdapter(width, self.bottleneck, grid, self.dropout)
                yield Placement(tower.name, index, site, module)
