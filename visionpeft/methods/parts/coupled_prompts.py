"""MaPLe: Multi-modal Prompt Learning (Khattak et al., 2022), https://arxiv.org/abs/2210.03117.

The learner `visionpeft.clip.MaPLe` attaches this method and reads the text prompt of block 0 from it.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.deep_prompts import EnteringPrompts, ReplaceTokens, check_depth, fresh_in_each_block
from visionpeft.sites import Placement, Shared


class Context(nn.Module):
    """The text prompt (num_tokens, width) of block 0, which a learner puts among the embedded words. N(0, 0.02^2)."""

    def __init__(self, num_tokens: int, width: int):
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(num_tokens, width) * 0.02)


class ProjectedPrompts(EnteringPrompts):
    """`EnteringPrompts` that a linear map makes from the text prompt of the same block.

    Args:
        text: the module that owns the text prompt.
        projection: maps the width of text tokens to that of image tokens.
        at: number of prefix tokens.
        norm: as in `EnteringPrompts`.
        spanning: whether they stay for several blocks.
    """

    def __init__(
        self, text: Context | ReplaceTokens, projection: nn.Linear, at: int, norm: nn.Module | None, spanning: bool
    ):
        super().__init__(len(text.prompts), at, norm, spanning)
        self.projection = projection
        self._text = (text,)  # in a tuple, because it is owned by the text tower's part of the adapter

    def entering(self) -> torch.Tensor:
        """projection(text prompt), (num_tokens, width)."""
        return self.projection(self._text[0].prompts)


@dataclass(frozen=True)
class CoupledPrompts(Method):
    """Learned text prompts p_i in each of the first blocks; the image prompts of block i are W_i p_i + b_i.

    Both are used as in `DeepPrompts`, with the same number and depth in both towers. p_0 is the context of the learner.
    p_i ~ N(0, 0.02^2); W_0, b_0 and one more pair have PyTorch's default, and all later blocks start as copies of that
    pair. Not mergeable: it adds tokens.
    Trainable, with text width d and image width D: depth * (num_tokens * d + d * D + D).
    Source: Khattak et al., MaPLe: Multi-modal Prompt Learning, 2022.

    Args:
        num_tokens: prompts per block in each tower.
        depth: number of blocks with their own prompts.
        text_start: number of start tokens before the text prompts.
    """

    num_tokens: int = 2
    depth: int = 9
    text_start: int = 1
    towers = ("text", "visual")

    def __post_init__(self):
        super().__post_init__()
        require(self.num_tokens > 0, self, "num_tokens must be a positive integer")

    def place_all(self, towers: Sequence[Tower]) -> Iterator[Placement | Shared]:
        """The context, `ReplaceTokens` in text blocks, and what their projections put into image blocks."""
        text, visual = towers
        for tower in towers:
            check_depth(self, "depth", self.depth, tower)
        context = Context(self.num_tokens, text.width)
        yield Shared(text.name, "context", context)
        replacing = [ReplaceTokens(self.num_tokens, text.width, self.text_start) for _ in range(1, self.depth)]
        for index, module in enumerate(replacing, start=1):
            yield Placement(text.name, index, "stream_in", module)
        first, later = (nn.Linear(text.width, visual.width) for _ in range(2))

        def make(index: int, norm: nn.Module | None, spanning: bool) -> ProjectedPrompts:
            projection = copy.deepcopy(later) if index else first
            source = [context, *replacing][index]
            return ProjectedPrompts(source, projection, visual.num_prefix_tokens, norm, spanning)

        yield from fresh_in_each_block(visual, self.depth, make)
