"""LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning (Sung, Cho and Bansal, 2022).

https://arxiv.org/abs/2206.06522
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block, init_weights_vit_timm
from torch.utils.checkpoint import checkpoint

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.base import Method, require, require_patches, to_parameter_dtype
from visionpeft.methods.parts.narrowing import narrowed
from visionpeft.sites import NEXT_BLOCK, Placement
from visionpeft.sites.frozen_layers import traced

STARTS = ("random", "magnitude")


class SideBlock(nn.Module):
    """The side network beside one block: s <- block(g s + (1 - g) D x), with x the tokens that leave the block.

    g = sigmoid(a / temperature), a zero. D has PyTorch's default start, the block that of a ViT of timm: weights
    N(0, 0.02^2), cut at two units, biases zero, unless it is given its tensors. Beside the first block stands
    s = D_0 x_0 before it, beside the last one U norm(s) after it, in the place of the tokens.

    Args:
        width: width D of the tokens.
        narrow: width w of the side network.
        heads: heads of its attention.
        hidden: hidden units of its MLP.
        temperature: a fixed number.
        beside: whether there is a side block here; without one, s is carried on as it is.
        tensors: what the block starts from, or None.
        first: whether it is beside the first block.
        last: whether it is beside the last one.
    """

    reads_all_patches = True

    def __init__(
        self,
        width: int,
        narrow: int,
        heads: int,
        hidden: int,
        temperature: float,
        beside: bool,
        tensors: dict[str, torch.Tensor] | None,
        first: bool,
        last: bool,
    ):
        super().__init__()
        self.temperature = temperature
        self.start = nn.Linear(width, narrow) if first else None
        self.gate = self.down = self.block = None
        if beside:
            self.gate = nn.Parameter(torch.zeros(1))
            self.down = nn.Linear(width, narrow)
            self.block = Block(narrow, heads, (hidden + 0.5) / narrow, qkv_bias=True)  # timm rounds down
            self.block.apply(init_weights_vit_timm)
            if tensors is not None:
                self.block.load_state_dict(tensors)
        self.norm, self.up = (LayerNorm(narrow), nn.Linear(narrow, width)) if last else (None, None)

    def forward(self, x: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """The state s (batch, tokens, w) before the block: what was carried, or made of tokens x (batch, tokens, D)."""
        return before if self.start is None else self.start(to_parameter_dtype(x, self.start.weight))

    def leave(self, x: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens x (batch, tokens, D) after the block, or what replaces them, and the state after the side block."""
        if self.block is not None:
            # Of all that a narrow block makes, as much as of two tokens for one, only x and s are kept.
            kept = torch.is_grad_enabled() and not traced()
            # There is no dropout in it, whose random numbers would have to be drawn again.
            again = functools.partial(checkpoint, self._step, use_reentrant=False, preserve_rng_state=False)
            s = (again if kept else self._step)(x, s)
        return (x, s) if self.up is None else (self.up(self.norm(s)).to(x.dtype), None)

    def _step(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.gate / self.temperature)
        down = self.down(to_parameter_dtype(x, self.down.weight))
        return self.block(gate * s + (1 - gate) * down)


@dataclass(frozen=True)
class LST(Method):
    """A narrow transformer beside the frozen one, which reads every block through a gate and replaces its features.

    s_0 = D_0 x_0; beside block i, s <- block_i(g_i s + (1 - g_i) D_i x_i) for the tokens x_i (batch, tokens, D) that
    leave block i, with g_i = sigmoid(a_i / temperature), D_i (w, D) with bias and a timm block of width w = D / ratio
    with as many heads as the backbone's and an MLP as wide in proportion; at the end U norm(s), U (D, w) with bias, in
    the place of the tokens after the last block. The final norm of the backbone, its pooling and the head follow, here
    as for all methods; in the paper's T5 only the head does.
    a starts at zero (g = 1/2), D and U as PyTorch has it, side blocks as those of a new ViT, or with
    `start="magnitude"` cut out of the backbone: the channels, rows of heads and hidden units with the largest weights.
    The paper cuts by Fisher importance, which needs data, and not by magnitude. The head sees other features than the
    backbone's from the first step on: no identity at the start.
    No gradient enters the backbone, and of the side network only what it reads is kept for the backward pass; the rest
    is computed again. Not mergeable. What a block hands on is no tensor but `visionpeft.sites.Carrying`, which hooks on
    blocks see. For image towers.
    Trainable on L blocks with side blocks and an MLP of 4 w: L (12 w^2 + 13 w + D w + w + 1) + (D w + w) + 2 w +
    (w D + D); 2,376,492 on ViT-B/16.
    Source: Sung, Cho and Bansal, LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning, 2022;
    the authors' code is for T5.

    Args:
        ratio: how much narrower the side network is.
        temperature: of the gates.
        start: of the side blocks, "random", or "magnitude" for weights of the backbone (blocks with a plain MLP).
        dropped: indices of blocks beside which there is no side block; the paper leaves out three of twelve.
        towers: which towers; by default the image tower.
    """

    ratio: int = 8
    temperature: float = 0.1
    start: str = "random"
    dropped: tuple[int, ...] = ()
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.ratio > 0, self, "ratio must be a positive integer")
        require(self.temperature > 0, self, f"temperature must be positive, not {self.temperature}")
        require(self.start in STARTS, self, f"start must be 'random' or 'magnitude', not {self.start!r}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `SideBlock` beside every block."""
        require_patches(self, tower)
        narrow = tower.width // self.ratio
        heads = tower.blocks[0].attention.num_heads
        fits = tower.width % self.ratio == 0 and narrow % heads == 0
        require(
            fits,
            self,
            f"ratio={self.ratio} does not divide a width of {tower.width} into {heads} heads of one size; "
            f"use a divisor of {tower.width // heads}",
        )
        unknown = [index for index in self.dropped if not 0 <= index < tower.depth]
        require(not unknown, self, f"dropped={self.dropped!r}, but the tower has blocks 0 to {tower.depth - 1}")
        require(len({*self.dropped}) < tower.depth, self, "dropped leaves no side block at all")
        hidden = tower.blocks[0].layer("fc2").in_features * narrow // tower.width
        starts = narrowed(tower, narrow, heads, hidden) if self.start == "magnitude" else [None] * tower.depth
        for index in range(tower.depth):
            module = SideBlock(
                tower.width,
                narrow,
                heads,
                hidden,
                self.temperature,
                beside=index not in self.dropped,
                tensors=starts[index],
                first=index == 0,
                last=index == tower.depth - 1,
            )
            yield Placement(tower.name, index, "stream_in", module, add=NEXT_BLOCK)
