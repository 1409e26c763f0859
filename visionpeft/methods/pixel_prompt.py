"""Exploring Visual Prompts for Adapting Large-Scale Models (Bahng et al., 2022), https://arxiv.org/abs/2203.17274."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Tower
from visionpeft.errors import UnsupportedError
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.grid import grid_of
from visionpeft.sites import Order, Placement


class Frame(nn.Module):
    """What a patch embedding gives for x + frame, as what it gives for x plus what it gives for the frame.

    The frame is zero but for a border of trained pixels, N(0, 1), of which every one is one number per channel.

    Args:
        channels: channels of the image.
        size: height and width of the image.
        border: width of the border.
    """

    stackable = True
    order = Order.WEIGHT  # before what scales or shifts the output of the layer

    def __init__(self, channels: int, size: tuple[int, int], border: int):
        super().__init__()
        height, width = size
        self.size = size
        self.border = border
        self.top = nn.Parameter(torch.randn(channels, border, width))
        self.bottom = nn.Parameter(torch.randn(channels, border, width))
        self.left = nn.Parameter(torch.randn(channels, height - 2 * border, border))
        self.right = nn.Parameter(torch.randn(channels, height - 2 * border, border))

    def image(self) -> torch.Tensor:
        """The frame (channels, height, width)."""
        inside = F.pad(self.left, (0, self.size[1] - 2 * self.border))
        return torch.cat((self.top, torch.cat((inside, self.right), dim=2), self.bottom), dim=1)

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias) -> torch.Tensor:
        """Map images x (batch, channels, height, width) and their patches y (batch, D, rows, columns) to patches."""
        if x.shape[-2:] != self.size:
            raise UnsupportedError(
                f"PixelPrompt frames images of {self.size[0]} x {self.size[1]} pixels, but these have {x.shape[-2]} x "
                f"{x.shape[-1]}; use images of the size it was attached for"
            )
        # A convolution is linear, so that one frame is enough for the whole batch, and no image is copied.
        return y + F.conv2d(self.image()[None].to(weight.dtype), weight, stride=weight.shape[-2:]).to(y.dtype)


@dataclass(frozen=True)
class PixelPrompt(Method):
    """A frame of trained pixels on every image: x + frame, zero but for a border of `width` pixels.

    It is added to the image as the model is given it, normalised. Pixels inside the border, and so the patches that lie
    inside it, stay as they are. The frame passes the patch embedding once for the whole batch, as that is linear.
    Every pixel is N(0, 1) at the start. Not mergeable: it is an image. (At one size, what the frame adds to each patch
    could go into the position embedding: on a ViT it is a change of the outer positions, by combinations of the columns
    of the patch embedding.) Images of another size than the model was built for are refused. Models for images of any
    size need `grid`, towers without a convolution of pixels to patches are refused.
    DAM-VP (Huang et al., 2023) has a frame for each of several clusters of images: several adapters and
    `visionpeft.route`. Its start, learned on other data sets, is not offered.
    Trainable on images of H x W with border w: 3 (2 w W + 2 w (H - 2 w)); 69,840 at 224 x 224.
    Source: Bahng et al., Exploring Visual Prompts for Adapting Large-Scale Models, 2022.

    Args:
        width: width of the border in pixels.
        grid: rows and columns of patches, for a model that takes images of any size; None for the model's own.
        towers: which towers; by default the image tower.
    """

    width: int = 30
    grid: tuple[int, int] | None = None
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.width > 0, self, "width must be a positive number of pixels")
        positive = all(n > 0 for n in self.grid or ())
        require(positive, self, f"grid must be rows and columns of patches, not {self.grid!r}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """A `Frame` at the patch embedding."""
        grid = grid_of(self, tower)
        layer = tower.layers.get("patch_embed")
        if layer is None or not _reads_pixels(layer, tower.patch_size):
            raise UnsupportedError("PixelPrompt needs a patch embedding that is one convolution of pixels to patches")
        size = tuple(number * side for number, side in zip(grid, tower.patch_size, strict=True))
        inside = 2 * self.width < min(size)
        sentence = f"a border of {self.width} pixels leaves nothing inside an image of {size[0]} x {size[1]}"
        require(inside, self, sentence)
        yield Placement(tower.name, None, "patch_embed", Frame(layer.owner.in_channels, size, self.width))


def _reads_pixels(layer: Layer, patch: tuple[int, int]) -> bool:
    """Whether a layer is a convolution of one patch after another."""
    owner = layer.owner
    if layer.kind != "conv" or owner.groups != 1 or owner.padding not in ((0, 0), "valid"):
        return False
    return tuple(owner.kernel_size) == tuple(owner.stride) == tuple(patch)
