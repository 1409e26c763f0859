"""P-tuning, first version: GPT Understands, Too (Liu et al., 2021), https://arxiv.org/abs/2103.10385."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require
from visionpeft.methods.parts.prompts import Prompts
from visionpeft.methods.parts.propagation import FromSource, travelling
from visionpeft.methods.parts.trees import tree_of
from visionpeft.methods.vpt import VPT
from visionpeft.sites import Placement


class EncodedPrompts(nn.Module):
    """A source of prompts fc2(relu(fc1(E))) of an embedding E (num_tokens, width), N(0, 1)."""

    def __init__(self, num_tokens: int, width: int, hidden: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num_tokens, width))
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def encoded(self) -> torch.Tensor:
        """The prompts (num_tokens, width)."""
        return self.fc2(F.relu(self.fc1(self.embedding)))

    def forward(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """The prompts (1, num_tokens, width), for all images the same."""
        return self.encoded()[None]


@dataclass(frozen=True)
class PTuning(Method):
    """Shallow prompts that an MLP makes from an embedding while training: P = W2 relu(W1 E + b1) + b2.

    They enter the first chosen block after the prefix tokens and leave after the last. The saved file holds
    `VPT(deep=False)` with the prompts that the MLP has come to: the MLP changes how they are trained, not what they can
    be. E is N(0, 1), the layers have PyTorch's default. The authors put a two-layer LSTM in both directions before the
    MLP (8,279,040 trained values with 10 prompts of width 768); it is not offered: it is folded away as well.
    Not mergeable: it adds tokens. Trainable with l = num_tokens and hidden width m: l D + 2 D m + m + D; 1,188,864 on
    ViT-B/16, of which 7,680 are saved.
    Source: Liu et al., GPT Understands, Too, 2021, and the authors' code.

    Args:
        num_tokens: prompts.
        hidden: hidden width m of the MLP; None for the width of the tokens.
        blocks: which blocks, consecutive, such as "all", "last:4" or "3:9".
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    num_tokens: int = 10
    hidden: int | None = None
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.num_tokens > 0, self, "num_tokens must be a positive integer")
        require(self.hidden is None or self.hidden > 0, self, "hidden must be a positive width or None")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """Prompts that enter the first chosen block and leave the last."""
        source = EncodedPrompts(self.num_tokens, tower.width, self.hidden or tower.width)
        yield from travelling(self, tower, blocks_of(self, tower), [source], self.num_tokens)

    def fold(self, part: nn.Module) -> tuple[VPT, nn.Module]:
        """`VPT(deep=False)` of the prompts that the MLP makes."""
        entering = {path: module for path, module in part.named_modules() if isinstance(module, FromSource)}
        plain = {
            path: Prompts(module.source.encoded().detach().clone(), module.at, 0.0, None, spanning=True)
            for path, module in entering.items()
        }
        # `init` is of no account for prompts that are given; "normal" is known to every tower.
        vpt = VPT(self.num_tokens, deep=False, init="normal", blocks=self.blocks, towers=self.towers)
        return vpt, tree_of(plain)
