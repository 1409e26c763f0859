"""DTL: Disentangled Transfer Learning for Visual Recognition (Fu, Zhu and Wu, 2023), https://arxiv.org/abs/2312.07856."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.tower import Tower
from visionpeft.errors import UnsupportedError
from visionpeft.methods.parts.base import Method, require, require_patches, to_parameter_dtype
from visionpeft.sites import NEXT_BLOCK, Placement, Shared

POOLINGS = ("model", "mean")


class GridConvolution(nn.Module):
    """One 3 x 3 kernel for each channel, without bias, over the grid of patches. PyTorch's default start.

    Args:
        width: number of channels.
        grid: rows and columns of patches.
        first: number of tokens before the patches, which stay as they are.
    """

    def __init__(self, width: int, grid: tuple[int, int], first: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.grid = tuple(grid)
        self.first = first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        rows, columns = self.grid
        if x.shape[1] - self.first != rows * columns:
            raise UnsupportedError(
                f"DTL convolves a grid of {rows} x {columns} patches, but there are {x.shape[1] - self.first}; use "
                "images of the size it was attached for"
            )
        patches = x[:, self.first :].transpose(1, 2).unflatten(2, self.grid)
        return torch.cat((x[:, : self.first], self.conv(patches).flatten(2).transpose(1, 2).to(x.dtype)), dim=1)


class SidePath(nn.Module):
    """The part of the side path beside one block: z = A x is carried on, and from some block on theta(h) is added.

    h = B_0 z_0 + ... + B_i z_i is never carried itself: the narrow z are, and every block that needs h makes it anew.
    A (rank, width) is Kaiming-uniform with a = sqrt(5), B (width, rank) zero: no change at the start.

    Args:
        width: width D of the tokens.
        rank: rank r.
        beta: theta(h) = h sigmoid(beta h).
        before: the side path beside the blocks before this one.
        adds: whether theta(h) is added to the tokens that leave the block.
        convolution: what patches of theta(h) pass, or None.
        pooled: number of tokens before the patches, the first of which becomes the mean of the patches after the
            block; None to leave it.
        last: whether it is the last block, from which nothing is carried on.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        beta: float,
        before: list["SidePath"],
        adds: bool,
        convolution: GridConvolution | None,
        pooled: int | None,
        last: bool,
    ):
        super().__init__()
        self.A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, width), a=math.sqrt(5)))
        self.B = nn.Parameter(torch.zeros(width, rank))
        self.beta = beta
        self.adds = adds
        self.pooled = pooled
        self.reads_all_patches = pooled is not None
        self.last = last
        self._before = tuple(before)  # in tuples, because the adapter owns them in places of their own
        self._convolution = (convolution,)

    def forward(self, x: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """Narrow tokens (batch, tokens, rank * (i + 1)) of the blocks up to this one, x (batch, tokens, width)."""
        z = F.linear(to_parameter_dtype(x, self.A), self.A)
        return z if before is None else torch.cat((before, z), dim=-1)

    def leave(self, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens x (batch, tokens, width) after the block, changed, and what is carried on."""
        if self.adds:
            change = self._theta(z)
            (convolution,) = self._convolution
            x = x + (change if convolution is None else convolution(change)).to(x.dtype)
        if self.pooled is not None:
            x = torch.cat((x[:, self.pooled :].mean(dim=1, keepdim=True), x[:, 1:]), dim=1)
        return x, None if self.last else z

    def _theta(self, z: torch.Tensor) -> torch.Tensor:
        B = torch.cat([each.B for each in (*self._before, self)], dim=1)
        if self.beta == 0:
            return F.linear(z, B) / 2
        # h sigmoid(beta h) = silu(beta h) / beta, for which beta h alone is kept.
        return F.silu(F.linear(z, self.beta * B)) / self.beta


@dataclass(frozen=True)
class DTL(Method):
    """A low-rank side path through all blocks, added to the tokens from a later block on; DTL+ with a convolution.

    h_0 = 0 and h_{i+1} = h_i + B_i A_i x_i for the tokens x_i that enter block i, A_i (r, D), B_i (D, r); from block
    `first` on, x_{i+1} = block_i(x_i) + theta(h_{i+1}) with theta(h) = h sigmoid(beta h). With `convolution` (DTL+) the
    patches of theta(h) pass one 3 x 3 kernel per channel that all blocks share, without bias; class and register tokens
    do not. A is Kaiming-uniform with a = sqrt(5), B zero, the kernels start as PyTorch has it: no change at the start.
    No gradient enters the blocks up to `first`: they are run without a graph. Blocks after it are differentiated
    through, so that the side path is disentangled from the backbone up to that point only.
    The authors' head reads the mean of the patches, after which comes the final norm: that is `pooling="mean"`, for
    models that otherwise read their class token. (timm's own average pooling with fc_norm reads the same.)
    Not mergeable: the side path crosses blocks and is not linear. What a block hands on is no tensor but
    `visionpeft.sites.Carrying`, which hooks on blocks see. For image towers.
    Trainable: L 2 r D, with convolution 9 D more; 36,864 and 43,776 on ViT-B/16.
    In the published code the grid of the convolution is fixed to 14 x 14; here it is that of the model.
    Source: Fu, Zhu and Wu, DTL: Disentangled Transfer Learning for Visual Recognition, 2023.

    Args:
        rank: rank r.
        beta: steepness of theta; with 100 it is nearly a ReLU, with 0 it is h / 2.
        first: the first block after which theta(h) is added; None for half of the blocks, 6 of 12 as in the paper.
        convolution: DTL+.
        pooling: what is read after the last block, "model" for what the model reads anyway, or "mean" of the patches.
        grid: rows and columns of patches, for DTL+ on a model that takes images of any size; None for the model's own.
        towers: which towers; by default the image tower.
    """

    name = "dtl"

    rank: int = 2
    beta: float = 100.0
    first: int | None = None
    convolution: bool = False
    pooling: str = "model"
    grid: tuple[int, int] | None = None
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.rank > 0, self, "rank must be a positive integer")
        require(math.isfinite(self.beta) and self.beta >= 0, self, f"beta must be from 0 on, not {self.beta}")
        require(self.first is None or self.first >= 0, self, f"first must be the index of a block, not {self.first}")
        require(self.pooling in POOLINGS, self, f"pooling must be 'model' or 'mean', not {self.pooling!r}")
        positive = all(n > 0 for n in self.grid or ())
        require(positive, self, f"grid must be rows and columns of patches, not {self.grid!r}")

    def place(self, tower: Tower) -> Iterator[Placement | Shared]:
        """One `SidePath` beside every block, and for DTL+ the `GridConvolution` they share."""
        require_patches(self, tower)
        last = tower.depth - 1
        first = tower.depth // 2 if self.first is None else self.first
        require(first <= last, self, f"first={first}, but the {tower.name} tower has {tower.depth} blocks, 0 to {last}")
        if self.pooling == "mean" and not tower.pools_class_token:
            raise UnsupportedError(
                "DTL: pooling='mean' takes the place of the class token, but this model reads other tokens after the "
                "last block; use pooling='model', or for timm create the model with global_pool='token'"
            )
        convolution = None
        if self.convolution:
            grid = self.grid or tower.grid_size
            if grid is None:
                raise UnsupportedError(
                    "DTL needs the grid of patches for its convolution, but this model takes images of any size; give "
                    "grid=(rows, columns)"
                )
            convolution = GridConvolution(tower.width, grid, tower.num_prefix_tokens)
            yield Shared(tower.name, "convolution", convolution)
        path: list[SidePath] = []
        for index in range(tower.depth):
            pooled = tower.num_prefix_tokens if self.pooling == "mean" and index == last else None
            adds = index >= first
            module = SidePath(
                tower.width, self.rank, self.beta, path, adds, convolution if adds else None, pooled, index == last
            )
            path.append(module)
            yield Placement(tower.name, index, "stream_in", module, add=NEXT_BLOCK)
