"""E^2VPT: An Effective and Efficient Approach for Visual Prompt Tuning (Han et al., 2023).

https://arxiv.org/abs/2307.13770
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require
from visionpeft.methods.prefix_tuning import prepend
from visionpeft.methods.vpt import VPT
from visionpeft.sites import Placement


class KeyValuePrompts(nn.Module):
    """Learned keys and values (num_tokens, width) before those of the tokens: [K; k] and [V; v], or [K; v] if shared.

    Kaiming-uniform over (heads, num_tokens, head width): evenly within sqrt(6 / (num_tokens * head width)). Their
    dropout is drawn for each sample.
    """

    stackable = True

    def __init__(self, num_tokens: int, width: int, head_width: int, shared: bool, dropout: float):
        super().__init__()
        self.num_tokens = num_tokens
        bound = math.sqrt(6 / (num_tokens * head_width))
        self.keys = nn.Parameter(torch.empty(num_tokens, width).uniform_(-bound, bound))
        self.values = None if shared else nn.Parameter(torch.empty(num_tokens, width).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)

    def forward(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map k and v (batch, heads, tokens, head width) to (batch, heads, num_tokens + tokens, head width)."""
        values = self.keys if self.values is None else self.values
        return self._before(self.keys, k), self._before(values, v)

    def _before(self, prompts: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        alone = prepend(prompts, x[:, :, :0])  # one for each sample, so that dropout draws for each
        return torch.cat((self.dropout(alone), x), dim=2)


@dataclass(frozen=True)
class E2VPT(Method):
    """Deep prompts of `VPT`, and learned keys and values in every attention: softmax(q [K; k]^T) [V; v].

    The prompts enter and leave every block and start as those of VPT; keys and values start Kaiming-uniform, evenly
    within sqrt(6 / (num_keys * head width)). Keys are not rotated and get no relative position bias.
    This is the method without its last stage, which prunes prompts and pieces of them and trains again. In published
    code that stage ranks by the signed gradient, so that what would help most goes first, and takes steps of the
    optimiser while it measures. There one tensor is both keys and values by default, although the paper draws two: that
    is `shared`; the default here is two. Not mergeable: it adds tokens.
    Trainable on L blocks of width D: L (num_tokens + 2 num_keys) D, with shared L (num_tokens + num_keys) D; 138,240
    on ViT-B/16 for 5 of each, as for 10 prompts and 5 shared.
    Source: Han et al., E^2VPT: An Effective and Efficient Approach for Visual Prompt Tuning, 2023, and the authors'
    code.

    Args:
        num_tokens: prompts per block; 0 for keys and values alone.
        num_keys: keys and values per block; 0 for `VPT`.
        shared: one tensor for both keys and values.
        dropout: dropout on prompts, keys and values; the paper's runs use 0.1.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers; by default the image tower.
    """

    num_tokens: int = 5
    num_keys: int = 5
    shared: bool = False
    dropout: float = 0.0
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        counts = (self.num_tokens, self.num_keys)
        require(all(n >= 0 for n in counts), self, "num_tokens and num_keys must be integers from 0 on")
        require(any(counts), self, "num_tokens and num_keys are both 0, so that nothing would be learned")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """The prompts of `VPT`, and `KeyValuePrompts` at the `kv` site of every chosen block."""
        require(tower.patch_size is not None, self, f"the {tower.name} tower has no patches to start prompts from")
        if self.num_tokens:
            yield from VPT(self.num_tokens, dropout=self.dropout, blocks=self.blocks).place(tower)
        if self.num_keys:
            for index in blocks_of(self, tower):
                block = tower.blocks[index]
                head_width = block.layer("q").out_features // block.attention.num_heads
                module = KeyValuePrompts(self.num_keys, block.attention_width, head_width, self.shared, self.dropout)
                yield Placement(tower.name, index, "kv", module)
