"""Prefix-Tuning: Optimizing Continuous Prompts for Generation (Li and Liang, 2021), https://arxiv.org/abs/2101.00190."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require
from visionpeft.sites import Placement, Shared


class Prefix(nn.Module):
    """Learned keys and values (num_tokens, width) before those of the tokens, split over the heads."""

    stackable = True

    def __init__(self, num_tokens: int, width: int):
        super().__init__()
        self.num_tokens = num_tokens
        self.keys = nn.Parameter(torch.randn(num_tokens, width) * 0.02)
        self.values = nn.Parameter(torch.randn(num_tokens, width) * 0.02)

    def forward(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map k and v (batch, heads, tokens, head width) to (batch, heads, num_tokens + tokens, head width)."""
        return prepend(self.keys, k), prepend(self.values, v)


def prepend(prefix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Put a prefix (num_tokens, heads * head width) before x (batch, heads, tokens, head width)."""
    batch, heads, _, head_width = x.shape
    prefix = prefix.view(-1, heads, head_width).transpose(0, 1).expand(batch, -1, -1, -1)
    return torch.cat((prefix.to(x.dtype), x), dim=2)


class Reparameterisation(nn.Module):
    """An MLP that makes the prefixes of all blocks from one embedding (num_tokens, width): W2 tanh(W1 E).

    E is N(0, 1), W1 and W2 with their biases have PyTorch's default, as in the authors' code.
    """

    def __init__(self, num_tokens: int, width: int, hidden: int, num_blocks: int):
        super().__init__()
        # Much smaller, it would be drowned by the bias of W1, and all tokens of a block would begin as nearly one.
        self.embedding = nn.Parameter(torch.randn(num_tokens, width))
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, num_blocks * 2 * width)

    def forward(self, position: int) -> torch.Tensor:
        """Keys and values (2, num_tokens, width) of the block at this position among the chosen ones."""
        width = self.embedding.shape[1]
        rows = slice(position * 2 * width, (position + 1) * 2 * width)
        hidden = torch.tanh(self.fc1(self.embedding))
        prefix = nn.functional.linear(hidden, self.fc2.weight[rows], self.fc2.bias[rows])
        return prefix.view(-1, 2, width).transpose(0, 1)


class ReparameterisedPrefix(nn.Module):
    """A `Prefix` whose keys and values come from a `Reparameterisation`."""

    stackable = True

    def __init__(self, source: Reparameterisation, position: int):
        super().__init__()
        self.num_tokens = len(source.embedding)
        self.position = position
        self._source = (source,)  # in a tuple, because the adapter owns it once for all blocks

    def forward(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map k and v (batch, heads, tokens, head width) to (batch, heads, num_tokens + tokens, head width)."""
        keys, values = self._source[0](self.position)
        return prepend(keys, k), prepend(values, v)

    def folded(self) -> Prefix:
        """The plain prefix with the same keys and values."""
        keys, values = self._source[0](self.position)
        prefix = Prefix(*keys.shape).to(keys)
        prefix.keys.data, prefix.values.data = keys.detach().clone(), values.detach().clone()
        return prefix


@dataclass(frozen=True)
class PrefixTuning(Method):
    """Learned keys and values that precede the tokens' in every attention: softmax(q [P_k; k]^T) [P_v; v].

    They are not rotated and get no relative position bias. With `mlp`, they are made by W2 tanh(W1 E) from one
    embedding while training, and the saved file holds plain prefixes. Plain ones start as N(0, 0.02); for the MLP the
    embedding is N(0, 1), as in the authors' code, and the layers have PyTorch's default.
    Not mergeable: it adds keys and values. Trainable on L blocks of width D: 2 L num_tokens D, or with a hidden
    width m: num_tokens D + D m + m + 2 L D (m + 1).
    Source: Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, 2021, and the authors' code.

    Args:
        num_tokens: keys and values per block.
        mlp: hidden width of the re-parameterisation, or None for plain prefixes.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    num_tokens: int = 10
    mlp: int | None = None
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.num_tokens > 0, self, "num_tokens must be a positive integer")
        require(self.mlp is None or self.mlp > 0, self, "mlp must be a positive width or None")

    def place(self, tower: Tower) -> Iterator[Placement | Shared]:
        """One prefix at the `kv` site of every chosen block."""
        blocks = blocks_of(self, tower)
        if self.mlp is not None:
            source = Reparameterisation(self.num_tokens, tower.attention_width_of(blocks), self.mlp, len(blocks))
            yield Shared(tower.name, "reparameterisation", source)
        for position, index in enumerate(blocks):
            width = tower.blocks[index].attention_width
            prefix = Prefix(self.num_tokens, width) if self.mlp is None else ReparameterisedPrefix(source, position)
            yield Placement(tower.name, index, "kv", prefix)

    def fold(self, part: nn.ModuleDict) -> tuple["PrefixTuning", nn.ModuleDict]:
        """Plain prefixes instead of the MLP that made them."""
        if self.mlp is None:
            return self, part
        folded = nn.ModuleDict()
        for tower, blocks in part.items():
            prefixes = {index: block["kv"].folded() for index, block in blocks.items() if index.isdigit()}
            folded[tower] = nn.ModuleDict({i: nn.ModuleDict({"kv": prefix}) for i, prefix in prefixes.items()})
        return replace(self, mlp=None), folded
