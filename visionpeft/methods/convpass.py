"""Convolutional Bypasses Are Better Vision Transformer Adapters (Jie and Deng, 2022), https://arxiv.org/abs/2207.07039."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
from timm.layers import DropPath

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require, to_parameter_dtype
from visionpeft.methods.parts.grid import as_images, as_patches, grid_in_block
from visionpeft.sites import Placement

# position -> (site it reads, site it is added at)
POSITIONS = {"attention": ("attn_in", "stream_mid"), "mlp": ("mlp_in", "stream_out")}
INITS = ("identity", "xavier")


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


class ConvolutionalBypass(nn.Module):
    """scale * drop_path(up(dropout(g(conv(g(down(x))))))) with g = QuickGELU and conv over the grid of patches.

    Every token before the patches passes the convolution as an image of one pixel: its centre and bias alone.
    down is Xavier-uniform; conv the identity at its centre ("identity") or Xavier-uniform ("xavier"); up and all biases
    are zero: no change at the start.

    Args:
        width: width D of the tokens.
        bottleneck: number h of channels of the convolution of 3 x 3 patches.
        grid: rows and columns of patches; None in a block that tells them at each call.
        scale: a fixed number.
        dropout: dropout before up.
        drop_path: probability of dropping the bypass for a sample while training.
        init: one of `INITS`.
    """

    stackable = True
    located_at = "patches"
    reads_grid = True

    def __init__(
        self,
        width: int,
        bottleneck: int,
        grid: tuple[int, int] | None,
        scale: float,
        dropout: float,
        drop_path: float,
        init: str,
    ):
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.conv = nn.Conv2d(bottleneck, bottleneck, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(bottleneck, width)
        self.drop_path = DropPath(drop_path)
        self.grid = grid
        self.scale = scale
        nn.init.xavier_uniform_(self.down.weight)
        for parameter in (self.down.bias, self.conv.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)
        if init == "identity":
            nn.init.dirac_(self.conv.weight)
        else:
            nn.init.xavier_uniform_(self.conv.weight)

    def forward(self, x: torch.Tensor, first: int, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Map tokens (batch, tokens, width), whose patches begin at index `first`, to what is added, likewise."""
        h = quick_gelu(self.down(to_parameter_dtype(x, self.down.weight)))
        apart = h[:, :first]
        patches = as_patches(self.conv(as_images(h[:, first:], grid or self.grid, "Convpass")))
        apart = nn.functional.linear(apart, self.conv.weight[:, :, 1, 1], self.conv.bias)
        h = quick_gelu(torch.cat((apart.to(patches.dtype), patches), dim=1))
        return (self.scale * self.drop_path(self.up(self.dropout(h)))).to(x.dtype)


@dataclass(frozen=True)
class Convpass(Method):
    """Convolutions of 3 x 3 patches beside attention and MLP: x + attn(u) + C(u) with u = norm1(x), and so the MLP.

    C(u) = scale * up(dropout(g(conv(g(down u))))), g = QuickGELU. The class token, as in the paper, and register and
    prompt tokens pass the convolution as images of one pixel. C is added after layer scale. No change at the start.
    Not mergeable: it is not linear and mixes patches. It needs the grid of patches: images of another size than the
    model was built for are refused. Models for images of any size need `grid`, towers without patches are refused.
    Trainable: 2 L (2 D h + h + D + 9 h^2 + h); 327,552 on ViT-B/16 for h = 8, half of it for attention alone.
    Source: Jie and Deng, Convolutional Bypasses Are Better Vision Transformer Adapters, 2022.

    Args:
        bottleneck: number h of channels.
        scale: a fixed number; the paper chooses it per task from 0.01 to 100.
        positions: "attention", "mlp" or both.
        dropout: dropout before up; 0.1 in the paper.
        drop_path: probability of dropping C for a sample; the paper drops it as it drops the block's branches.
        init: of the convolution, "identity" or "xavier"; the paper chooses it per task.
        grid: rows and columns of patches, for a model that takes images of any size; None for the model's own.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers; by default the image tower.
    """

    bottleneck: int = 8
    scale: float = 1.0
    positions: tuple[str, ...] = ("attention", "mlp")
    dropout: float = 0.1
    drop_path: float = 0.0
    init: str = "identity"
    grid: tuple[int, int] | None = None
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.bottleneck > 0, self, "bottleneck must be a positive integer")
        for field in ("dropout", "drop_path"):
            value = getattr(self, field)
            require(0 <= value < 1, self, f"{field} must be in [0, 1), not {value}")
        known = set(self.positions) <= set(POSITIONS) and self.positions
        require(known, self, f"positions must be a list out of {', '.join(POSITIONS)}, not {self.positions!r}")
        require(self.init in INITS, self, f"init must be one of {', '.join(INITS)}, not {self.init!r}")
        positive = all(n > 0 for n in self.grid or ())
        require(positive, self, f"grid must be rows and columns of patches, not {self.grid!r}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `ConvolutionalBypass` at every position of every chosen block."""
        for index in blocks_of(self, tower):
            grid, width = grid_in_block(self, tower, index), tower.blocks[index].width
            for position in dict.fromkeys(self.positions):
                reads, add = POSITIONS[position]
                module = ConvolutionalBypass(
                    width, self.bottleneck, grid, self.scale, self.dropout, self.drop_path, self.init
                )
                yield Placement(tower.name, index, reads, module, add=add)
