"""Independent vision-language prompts, the baseline of MaPLe (Khattak et al., 2022), https://arxiv.org/abs/2210.03117.

The learners of `visionpeft.clip` attach this method: on its own it would overwrite words of the user's texts.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.prompts import EnteringTokens, RemovePrompts
from visionpeft.sites import Order, Placement


class ReplaceTokens(nn.Module):
    """Overwrites the tokens from `first` on by learned ones (num_tokens, width), which the batch shares.

    They get no position embedding. N(0, 0.02^2).
    """

    order = Order.REPLACE

    def __init__(self, num_tokens: int, width: int, first: int):
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(num_tokens, width) * 0.02)
        self.replaced_tokens = (first, first + num_tokens)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        first, stop = self.replaced_tokens
        prompts = self.prompts.to(x.dtype).expand(x.shape[0], -1, -1)
        return torch.cat((x[:, :first], prompts, x[:, stop:]), dim=1)


class EnteringPrompts(EnteringTokens):
    """Inserts tokens after the prefix tokens, where `VPT` inserts its prompts; they may pass a norm first.

    Args:
        num_tokens: number of tokens.
        at: number of prefix tokens.
        norm: what normalises the tokens of the tower before the first block, for prompts of that block; None for
            those of other blocks.
        spanning: whether they stay for several blocks.
    """

    def __init__(self, num_tokens: int, at: int, norm: nn.Module | None, spanning: bool):
        super().__init__(num_tokens, at, spanning)
        self._norm = (norm,)  # in a tuple, because it belongs to the backbone

    @abstractmethod
    def entering(self) -> torch.Tensor:
        """The tokens (num_tokens, width)."""

    def prompts_for(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens (1, num_tokens, width) as they enter, in the precision of x."""
        (norm,) = self._norm
        prompts = self.entering().to(x.dtype)
        prompts = prompts if norm is None else norm(prompts).to(x.dtype)
        return prompts[None]


class VisualPrompts(EnteringPrompts):
    """`EnteringPrompts` that are learned themselves, N(0, 0.02^2)."""

    def __init__(self, num_tokens: int, width: int, at: int, norm: nn.Module | None, spanning: bool):
        super().__init__(num_tokens, at, norm, spanning)
        self.prompts = nn.Parameter(torch.randn(num_tokens, width) * 0.02)

    def entering(self) -> torch.Tensor:
        """The learned tokens (num_tokens, width)."""
        return self.prompts


def fresh_in_each_block(
    tower: Tower, depth: int, make: Callable[[int, nn.Module | None, bool], EnteringPrompts]
) -> Iterator[Placement]:
    """Prompts that are fresh in each of the first `depth` blocks, the last of which stay to the end of the tower.

    Prompts that are replaced before the next block may as well leave after their own, which is what they do here.

    Args:
        tower: the tower.
        depth: number of blocks with fresh prompts.
        make: makes those of a block from its index, the norm they pass and whether they stay for several blocks.
    """
    last = tower.depth - 1
    norm = tower.layers.get("norm_pre")
    for index in range(depth):
        leaves = last if index == depth - 1 else index
        spanning = leaves > index
        enter = make(index, norm.owner if norm is not None and index == 0 else None, spanning)
        yield Placement(tower.name, index, "stream_in", enter)
        leave = RemovePrompts(enter.num_tokens, tower.num_prefix_tokens, spanning)
        yield Placement(tower.name, leaves, "stream_out", leave)


def check_depth(method: Method, field: str, depth: int, tower: Tower) -> None:
    """Refuse a depth that the tower does not have."""
    sentence = f"{field}={depth}, but the {tower.name} tower has {tower.depth} blocks; use 1 to {tower.depth}"
    require(isinstance(depth, int) and 1 <= depth <= tower.depth, method, sentence)


@dataclass(frozen=True)
class DeepPrompts(Method):
    """Fresh learned tokens in each of the first blocks of both towers, each tower with its own.

    Images: `num_visual` prompts per block after the prefix tokens; those of block `depth_visual` - 1 stay to the end.
    Those of block 0 pass the tower's norm before the blocks. Text: in blocks 1 to `depth_text` - 1 the `num_text`
    tokens after the start token are overwritten. Block 0 takes them as they come: the context of a learner.
    All N(0, 0.02^2). Not mergeable: it adds tokens.
    Trainable: (depth_text - 1) * num_text * text width + depth_visual * num_visual * image width.
    Source: Khattak et al., MaPLe: Multi-modal Prompt Learning, 2022 (IVLP).

    Args:
        num_text: tokens that are overwritten in the text tower; 0 to leave it alone.
        num_visual: prompts in the image tower; 0 to leave it alone.
        depth_text: number of text blocks with their own tokens, block 0 included.
        depth_visual: number of image blocks with fresh prompts.
        text_start: number of start tokens before the tokens that are overwritten.
    """

    num_text: int = 2
    num_visual: int = 2
    depth_text: int = 12
    depth_visual: int = 12
    text_start: int = 1

    def __post_init__(self):
        super().__post_init__()
        counts = (self.num_text, self.num_visual)
        require(
            all(n >= 0 for n in counts),
            self,
            "num_text and num_visual must be integers from 0 on",
        )
        require(any(counts), self, "num_text and num_visual are both 0, so that nothing would be learned")

    @property
    def towers(self) -> list[str]:
        """The towers that get prompts."""
        return [name for name, number in (("text", self.num_text), ("visual", self.num_visual)) if number]

    def place(self, tower: Tower) -> Iterator[Placement]:
        """`ReplaceTokens` at `stream_in` of text blocks; prompts that enter and leave image blocks."""
        if tower.name == "text":
            check_depth(self, "depth_text", self.depth_text, tower)
            for index in range(1, self.depth_text):
                module = ReplaceTokens(self.num_text, tower.width, self.text_start)
                yield Placement(tower.name, index, "stream_in", module)
            return
        check_depth(self, "depth_visual", self.depth_visual, tower)

        def make(index: int, norm: nn.Module | None, spanning: bool) -> VisualPrompts:
            return VisualPrompts(self.num_visual, tower.width, tower.num_prefix_tokens, norm, spanning)

        yield from fresh_in_each_block(tower, self.depth_visual, make)
