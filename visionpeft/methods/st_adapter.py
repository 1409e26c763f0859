"""ST-Adapter: Parameter-Efficient Image-to-Video Transfer Learning (Pan et al., 2022).

https://arxiv.org/abs/2206.13559
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.frames import Frames
from visionpeft.backbones.tower import Tower
from visionpeft.errors import UnsupportedError
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, frames_of, require, to_parameter_dtype
from visionpeft.sites import Order, Placement

# position -> site
POSITIONS = {"before_attention": "stream_in", "before_mlp": "stream_mid"}


class SpatioTemporalBottleneck(nn.Module):
    """x + up(conv(down(x))) on the patches x of clips, conv a depth-wise convolution over frames, rows and columns.

    conv, its bias and the biases of down and up are zero, so that nothing changes at the start; the weights of down
    and up are Kaiming-uniform with a = sqrt(5). Until conv has moved, it alone has a gradient.

    Args:
        width: width of the tokens.
        bottleneck: number of channels of the convolution.
        kernel: odd size over frames, rows and columns; zeros are padded on all sides.
        grid_size: rows and columns of patches; only needed by a kernel that is larger than one patch.
        frames: how clips lie in the batch.
    """

    stackable = True
    patches_only = True

    def __init__(
        self,
        width: int,
        bottleneck: int,
        kernel: tuple[int, int, int],
        grid_size: tuple[int, int] | None,
        frames: Frames,
    ):
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.conv = nn.Conv3d(
            bottleneck, bottleneck, kernel, padding=tuple(size // 2 for size in kernel), groups=bottleneck
        )
        self.up = nn.Linear(bottleneck, width)
        self.grid_size = grid_size
        self.frames = frames
        for parameter in (self.conv.weight, self.conv.bias, self.down.bias, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map patches (clips * frames, patches, width) to the same shape."""
        h = self.frames.split(self.down(to_parameter_dtype(x, self.down.weight)))
        h = self._over_frames(h) if self.conv.kernel_size[1:] == (1, 1) else self._over_grid(h)
        return x + self.up(h.flatten(0, 1)).to(x.dtype)

    def _over_frames(self, h: torch.Tensor) -> torch.Tensor:
        # The same as the three-dimensional convolution. In this layout, channels last, it runs without a copy.
        h = h.permute(0, 3, 1, 2)  # clips, channels, frames, patches
        weight, padding = self.conv.weight.squeeze(-1), self.conv.padding[:2]
        return F.conv2d(h, weight, self.conv.bias, padding=padding, groups=h.shape[1]).permute(0, 2, 3, 1)

    def _over_grid(self, h: torch.Tensor) -> torch.Tensor:
        rows, columns = self.grid_size
        if h.shape[2] != rows * columns:
            raise UnsupportedError(
                f"the kernel {self.conv.kernel_size} of STAdapter needs the {rows} x {columns} patches of the model's "
                f"own image size, but there are {h.shape[2]}; use that size, or a kernel over frames alone"
            )
        h = h.unflatten(2, self.grid_size).permute(0, 4, 1, 2, 3)  # clips, channels, frames, rows, columns
        return self.conv(h).permute(0, 2, 3, 4, 1).flatten(2, 3)


class MeanOverFrames(nn.Module):
    """Puts their mean over the frames of a clip in the place of the tokens of every frame.

    What a `VideoClassifier` averages after it are then equal features: those of the final norm of the mean.
    """

    stackable = True
    order = Order.READ
    tokenwise = True

    def __init__(self, frames: Frames):
        super().__init__()
        self.frames = frames

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (clips * frames, tokens, width) to the same shape."""
        clips = self.frames.split(x)
        return clips.mean(dim=1, keepdim=True).expand_as(clips).flatten(0, 1)


@dataclass(frozen=True)
class STAdapter(Method):
    """A bottleneck with a depth-wise convolution over the frames of a clip: x + up(conv(down(x))) on the patches x.

    Class, register and prompt tokens stay as they are. There is no activation, no dropout and no norm. conv is zero at
    the start: no change. Clips may have any number of frames. Not mergeable: it mixes tokens. For a `VideoClassifier`,
    which averages the normalised features of the frames; the authors average over the frames first and normalise the
    mean, and so does this after the last block, unless `norm_of_mean` is off. Logits differ by 3 to 5 %.
    Before the MLP of the last block it reaches nothing that is read from the class token, as published.
    Trainable for width D, bottleneck w and k numbers in a kernel: 2 D w + w (k + 2) + D for each position in each
    block; 7,110,144 on ViT-B/16 for one position, 14,220,288 for both.
    Source: Pan et al., ST-Adapter: Parameter-Efficient Image-to-Video Transfer Learning, 2022.

    Args:
        bottleneck: width w; half the width of the tokens in the paper.
        kernel: size over frames, rows and columns of patches, each odd.
        positions: "before_attention", on the tokens that enter a block; "before_mlp", on those between attention and
            MLP; or both. The authors' Kinetics runs use the second alone, those on Something-Something both.
        norm_of_mean: the final norm is that of the mean over frames, as published; else it is of each frame, of which
            the mean is taken after it.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers; by default the image tower.
    """

    name = "st_adapter"  # no word boundary in the capitals
    written_without = {"norm_of_mean": False}  # noqa: RUF012  (annotated in Method)

    bottleneck: int = 384
    kernel: tuple[int, int, int] = (3, 1, 1)
    positions: tuple[str, ...] = ("before_attention",)
    norm_of_mean: bool = True
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.bottleneck > 0, self, "bottleneck must be a positive integer")
        odd = all(size > 0 and size % 2 == 1 for size in self.kernel)
        require(odd, self, f"kernel must be three odd sizes, not {self.kernel!r}")
        known = set(self.positions) <= set(POSITIONS) and self.positions
        require(known, self, f"positions must be a list out of {', '.join(POSITIONS)}, not {self.positions!r}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `SpatioTemporalBottleneck` at every position of every chosen block, `MeanOverFrames` after the last."""
        frames, kernel = frames_of(self, tower), tuple(self.kernel)
        spatial = kernel[1:] != (1, 1)
        for index in blocks_of(self, tower):
            block = tower.blocks[index]
            fixed = not spatial or block.grid is not None
            require(fixed, self, f"kernel={kernel} needs a model with a fixed grid of patches; use 1, 1")
            for position in dict.fromkeys(self.positions):
                width = block.width_at(POSITIONS[position])
                module = SpatioTemporalBottleneck(width, self.bottleneck, kernel, block.grid, frames)
                yield Placement(tower.name, index, POSITIONS[position], module)
        if self.norm_of_mean:
            yield Placement(tower.name, tower.depth - 1, "stream_out", MeanOverFrames(frames))
