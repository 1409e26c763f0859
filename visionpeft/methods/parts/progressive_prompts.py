"""Prompts that travel through all blocks of an image tower, into which each block mixes its own (Xu et al., 2023).

The learner `visionpeft.clip.ProVP` attaches this method. https://arxiv.org/abs/2304.08386
"""

from collections.abc import Iterator
from dataclasses import dataclass

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.prompts import uniform_prompts
from visionpeft.methods.parts.propagation import LearnedPrompts, travelling
from visionpeft.sites import Placement


@dataclass(frozen=True)
class ProgressivePrompts(Method):
    """Prompts before the patches: P_0 in block 0; before block l > 0, carry * (what came out) + (1 - carry) * P_l.

    With carry 0 they are those of `VPT(deep=True)`. All start as those of `VPT`. Not mergeable: it adds tokens.
    Trainable on L blocks of width D: L * num_tokens * D.
    Source: Xu et al., Progressive Visual Prompt Learning with Contrastive Feature Re-formation, 2023.

    Args:
        num_tokens: prompts per block.
        carry: share of what came out of the block before, from 0 to less than 1.
    """

    num_tokens: int = 16
    carry: float = 0.01
    towers = ("visual",)

    def __post_init__(self):
        super().__post_init__()
        require(self.num_tokens > 0, self, "num_tokens must be a positive integer")
        require(0 <= self.carry < 1, self, f"carry must be a share from 0 to less than 1, not {self.carry}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """Prompts of block 0 that leave after the last block, and at each later one what mixes in its own."""
        require(tower.patch_size, self, f"the {tower.name} tower has no patches")
        sources = [LearnedPrompts(uniform_prompts(tower, self.num_tokens)) for _ in range(tower.depth)]
        keep, add = self.carry, 1 - self.carry
        yield from travelling(self, tower, range(tower.depth), sources, self.num_tokens, keep, add)
