"""Towards Adaptive Prefix Tuning for Parameter-Efficient Language Model Fine-tuning (Zhang et al., 2023).

https://arxiv.org/abs/2305.15212
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require, to_parameter_dtype
from visionpeft.methods.parts.grid import require_patches
from visionpeft.methods.parts.propagation import summary
from visionpeft.sites import Placement

START = 0.02


class AdaptivePrefix(nn.Module):
    """[level a P_k; k] and [level a P_v; v] with a = sigmoid(gate(h)), one number for each prefix token of an image.

    h is the class token as the attention reads it, without one the mean of all tokens. P is N(0, 0.02^2), level one,
    gate as PyTorch has it.

    Args:
        num_tokens: keys and values.
        width: their width, all heads together.
        read: width of what the attention reads.
        class_token: whether the first token is the class token.
    """

    stackable = True
    reads_attention_input = True

    def __init__(self, num_tokens: int, width: int, read: int, class_token: bool):
        super().__init__()
        self.num_tokens = num_tokens
        self.class_token = class_token
        self.reads_all_patches = not class_token
        self.keys = nn.Parameter(torch.randn(num_tokens, width) * START)
        self.values = nn.Parameter(torch.randn(num_tokens, width) * START)
        self.gate = nn.Linear(read, num_tokens)
        self.level = nn.Parameter(torch.ones(1))

    def forward(self, k: torch.Tensor, v: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map k and v (batch, heads, tokens, head width) to (batch, heads, num_tokens + tokens, head width)."""
        h = to_parameter_dtype(summary(h, self.class_token, 0), self.level)
        share = (self.level * self.gate(h).sigmoid())[:, :, None]
        return _before(share * self.keys, k), _before(share * self.values, v)


def _before(prefix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A prefix (batch, num_tokens, heads * head width) before x (batch, heads, tokens, head width)."""
    by_head = prefix.unflatten(2, (x.shape[1], -1)).transpose(1, 2)
    return torch.cat((by_head.to(x.dtype), x), dim=2)


@dataclass(frozen=True)
class APT(Method):
    """Prefix-tuning that every image weighs for itself: keys and values of a prefix times level * sigmoid(W h + b).

    In every block the l prefix tokens have a gate each, made from the class token h as the attention reads it (without
    one, from the mean of all tokens), and one trained level for all of them. The formula is recalled from the paper,
    whose code was not found: it may read the state before the norm. Keys and values are N(0, 0.02^2), level one, W and
    b PyTorch's default, so that gates start near one half; with all gates one it is `PrefixTuning`. Prefixes are not
    rotated and get no relative position bias. The class token is that of an image, so that text towers are refused.
    Not mergeable: it adds keys and values.
    Trainable on L blocks of width D: L (2 l D + D l + l + 1); 276,612 on ViT-B/16.
    Source: Zhang et al., Towards Adaptive Prefix Tuning for Parameter-Efficient Language Model Fine-tuning, 2023;
    published for language models alone.

    Args:
        num_tokens: keys and values per block.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers; by default the image tower.
    """

    num_tokens: int = 10
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.num_tokens > 0, self, "num_tokens must be a positive integer")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `AdaptivePrefix` at the `kv` site of every chosen block."""
        require_patches(self, tower)
        for index in blocks_of(self, tower):
            block = tower.blocks[index]
            widths = block.attention_width, block.width_at("attn_in")
            module = AdaptivePrefix(self.num_tokens, *widths, tower.class_token)
            yield Placement(tower.name, index, "kv", module)
