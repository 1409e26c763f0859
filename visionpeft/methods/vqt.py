"""VQT: Visual Query Tuning (Tu, Mai and Chao, 2022), https://arxiv.org/abs/2212.03220."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.errors import UnsupportedError
from visionpeft.methods.parts.base import Method, require, require_patches
from visionpeft.methods.parts.several_features import Gathered
from visionpeft.sites import HEAD, Asker, Placement


class Queries(nn.Module):
    """Learned tokens Q (num_tokens, width) that ask in one block; what they get goes to the head.

    Args:
        prompts: where Q starts.
        dropout: dropout on Q, drawn for each sample.
        index: index of the block.
        gathered: where the head finds what they got.
    """

    tokenwise = True
    reads_all_patches = True

    def __init__(self, prompts: torch.Tensor, dropout: float, index: int, gathered: Gathered):
        super().__init__()
        self.prompts = nn.Parameter(prompts)
        self.dropout = nn.Dropout(dropout)
        self.index = index
        self.gathered = gathered

    def ask(self, asker: Asker, k: torch.Tensor, v: torch.Tensor, h: torch.Tensor, remake: Callable | None) -> None:
        """Let Q pass the block with the keys k and values v of its tokens (batch, heads, tokens, head width).

        Args:
            asker: runs tokens that ask through the block.
            k: the keys.
            v: the values.
            h: what the attention of the block reads (batch, tokens, width).
            remake: makes k and v from h.
        """
        drawn = self.training and self.dropout.p > 0
        queries = self.dropout(self.prompts.expand(len(k) if drawn else 1, -1, -1)).to(h.dtype)
        self.gathered.put(self.index, asker(queries, k, v, h, remake))


@dataclass(frozen=True)
class VQT(Method):
    """Learned tokens that ask in every block and are seen by nobody; the head reads all that they get.

    In block l, Q_l (T, D) passes the norm, attends to the keys and values of the backbone's tokens only, and passes
    residual, MLP and residual; z_l (T, D) leaves. The backbone's tokens are to the bit what they are without. The head
    is linear on [u(f); u(z_1); ...; u(z_L)] of width D (1 + L T), with f what the model pools and u division of a whole
    part by its length.
    Q ~ U(-b, b) with b = sqrt(6 / (3 * patch height * patch width + D)). Of the head, the columns for f and the bias
    start as those of the model's head, all others as PyTorch has them for a linear layer of that width.
    No gradient enters the backbone's tokens, and of a block only what its attention reads is kept; keys and values are
    made again from it. Queries have no position, and no dropout of the backbone is drawn for them. Not mergeable. It
    needs a linear classification head, which is trained with it, and acts alone: beside other adapters, and with
    further parameters trained, it is refused. For image towers.
    Trainable: L T D, 9,216 on ViT-B/16 for one token, and a head of C (D (1 + L T) + 1) for C classes, 998,500 for 100.
    The authors may then choose features by a group lasso on the head's columns and train again; this is not done here.
    Source: Tu, Mai and Chao, Visual Query Tuning: Towards Effective Usage of Intermediate Representations for Parameter
    and Memory Efficient Transfer Learning, 2022.

    Args:
        num_tokens: number T of tokens in each block.
        dropout: dropout on them; 0.1 in the paper.
        towers: which towers; by default the image tower.
    """

    name = "vqt"

    num_tokens: int = 1
    dropout: float = 0.1
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.num_tokens > 0, self, "num_tokens must be a positive integer")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")

    def gathers(self, tower: Tower) -> int:
        """Width of what the head reads besides the pooled features."""
        return tower.depth * self.num_tokens * tower.width

    def place(self, tower: Tower) -> Iterator[Placement]:
        """`Queries` in every block."""
        require_patches(self, tower)
        if tower.frames is not None:
            raise UnsupportedError("VQT's head reads single images, but this model pools the frames of clips")
        height, breadth = tower.patch_size
        bound = math.sqrt(6 / (3 * height * breadth + tower.width))
        gathered = Gathered(tower.depth)
        for index in range(tower.depth):
            prompts = torch.empty(self.num_tokens, tower.width).uniform_(-bound, bound)
            yield Placement(tower.name, index, "kv", Queries(prompts, self.dropout, index, gathered), add=HEAD)
