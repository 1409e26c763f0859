"""Prefix Propagation: Parameter-Efficient Tuning for Long Sequences (Li et al., 2023).

https://arxiv.org/abs/2305.12086
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require
from visionpeft.methods.parts.propagation import LearnedPrompts, travelling
from visionpeft.sites import Placement

START = 0.02


@dataclass(frozen=True)
class PrefixPropagation(Method):
    """Prompts that travel through all blocks and get learned ones added before each: x_P <- keep x_P + add P_l.

    P_l (num_tokens, D) for block l; x_P is what the block before has made of the prompts. Those of the first block
    enter after the prefix tokens as they are, and after the last block they leave. The paper has keep = add = 1. With
    keep=0 and add=1 it is `VPT(deep=True)`, with P_l = 0 after the first block `VPT(deep=False)`, and keep=0.01 with
    add=0.99 has the image prompts of ProVP-Ref (Xu et al., 2024), whose published code lets prompts enter only if there
    are more than four, and else overwrites patches.
    All P_l are N(0, 0.02^2), as recalled, not read. The authors' optional MLP that makes all P_l from one embedding is
    not offered. Not mergeable: it adds tokens.
    Trainable on L blocks of width D: L num_tokens D; 92,160 on ViT-B/16, half of `PrefixTuning`'s.
    Source: Li et al., Prefix Propagation: Parameter-Efficient Tuning for Long Sequences, 2023.

    Args:
        num_tokens: prompts.
        keep: factor of the prompts as the block before leaves them.
        add: factor of the learned ones.
        dropout: dropout on the learned ones, drawn for each sample.
        blocks: which blocks, consecutive, such as "all", "last:4" or "3:9".
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    num_tokens: int = 10
    keep: float = 1.0
    add: float = 1.0
    dropout: float = 0.0
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.num_tokens > 0, self, "num_tokens must be a positive integer")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        require(self.add != 0, self, "add is 0, so that nothing would be learned after the first block; use VPT")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """Prompts that enter the first chosen block and leave the last, a `Propagation` before every other."""
        blocks = blocks_of(self, tower)
        starts = [torch.randn(self.num_tokens, tower.width) * START for _ in blocks]
        sources = [LearnedPrompts(each, self.dropout) for each in starts]
        yield from travelling(self, tower, blocks, sources, self.num_tokens, self.keep, self.add)
