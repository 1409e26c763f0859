"""Visual Prompt Tuning (Jia et al., 2022), https://arxiv.org/abs/2203.12119."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks, Overrides
from visionpeft.methods.parts.base import Method, blocks_of, require
from visionpeft.methods.parts.prompts import Prompts, RemovePrompts, uniform_prompts
from visionpeft.sites import Placement, Shared


@dataclass(frozen=True)
class VPT(Method):
    """Learned prompt tokens before the patches.

    Deep: every chosen block gets fresh prompts, which leave after it; the same function as overwriting the prompts of
    the block before. Shallow: prompts enter the first chosen block and leave after the last. Prompts sit after all
    prefix tokens, have no position embedding and are gone before pooling. Not mergeable: it adds tokens.
    Where a breakpoint hits: in the default job (`vtab_vpt.yaml`: deep, on a ViT) it is `Prompts.prompts_for` that runs
    in every block, and never `Prompts.forward` nor `RemovePrompts.forward`. Prompts that leave their own block reach
    the other tokens through keys and values alone, so that is all they are. The two `forward` run where prompts are
    tokens of the stream: shallow prompts, a causal tower, or a block in which something acts that does not take each
    token by itself; in a mixed batch (`visionpeft.route`) also if that is so for one of its rows, or if anything acts
    on the prompts before the attention. Outputs and gradients are the same.
    P ~ U(-v, v) with v = sqrt(6 / (3 * patch height * patch width + prompt width)), with the width of the first block
    where later ones are wider. The projection's weight is Kaiming-normal over its outputs, its bias PyTorch's default.
    Trainable on L blocks of width D: L * num_tokens * D deep, num_tokens * D shallow; with a projection of width d,
    L * num_tokens * d + d * D + D.
    Source: Jia et al., Visual Prompt Tuning, 2022.

    Args:
        num_tokens: prompts per block.
        deep: fresh prompts in every block, or one set that travels through all.
        dropout: dropout on the prompts; the paper's deep runs use 0.1.
        projection: width of the prompts before a shared linear projection to the token width; None for no projection.
        init: "uniform" as in the paper, or "normal" with standard deviation 0.02 (towers without patches).
        overrides: other numbers of prompts for some blocks, such as {"last:4": 50}; deep only.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    num_tokens: int = 10
    deep: bool = True
    dropout: float = 0.0
    projection: int | None = None
    init: str = "uniform"
    overrides: dict[str, int] = field(default_factory=dict)
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        counts = [self.num_tokens, *self.overrides.values()]
        require(all(n > 0 for n in counts), self, "num_tokens must be a positive integer")
        require(self.deep or not self.overrides, self, "overrides of num_tokens need deep=True")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        require(self.projection is None or self.projection > 0, self, "projection must be a positive width or None")
        require(self.init in ("uniform", "normal"), self, f"init must be 'uniform' or 'normal', not {self.init!r}")

    def place(self, tower: Tower) -> Iterator[Placement | Shared]:
        """Prompts at `stream_in`, their removal at `stream_out`."""
        uniform = self.init == "uniform"
        require(not uniform or tower.patch_size, self, f"the {tower.name} tower has no patches; use init='normal'")
        blocks = blocks_of(self, tower)
        require(
            self.deep or blocks == list(range(blocks[0], blocks[-1] + 1)),
            self,
            f"shallow prompts travel through consecutive blocks, not through blocks={self.blocks!r}",
        )
        projection = None
        if self.projection is not None:
            projection = nn.Linear(self.projection, tower.width_of(blocks))
            nn.init.kaiming_normal_(projection.weight, a=0, mode="fan_out")
            yield Shared(tower.name, "projection", projection)
        counts = Overrides(self.num_tokens, self.overrides, tower, (), "VPT overrides")
        at = tower.num_prefix_tokens
        spans = [(index, index) for index in blocks] if self.deep else [(blocks[0], blocks[-1])]
        for first, last in spans:
            prompts = self._initial(tower, first, counts.at(first))
            enter = Prompts(prompts, at, self.dropout, projection, spanning=not self.deep)
            yield Placement(tower.name, first, "stream_in", enter)
            leave = RemovePrompts(len(prompts), at, spanning=not self.deep)
            yield Placement(tower.name, last, "stream_out", leave)

    def _initial(self, tower: Tower, block: int, num_tokens: int) -> torch.Tensor:
        width = self.projection or tower.blocks[block].width_at("stream_in")
        if self.init == "normal":
            return torch.randn(num_tokens, width) * 0.02
        return uniform_prompts(tower, num_tokens, width, self.projection)
