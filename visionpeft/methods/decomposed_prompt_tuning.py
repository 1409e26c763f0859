"""DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning (Shi and Lipani, 2024).

https://arxiv.org/abs/2309.05173
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.errors import UnsupportedError
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.grid import grid_of
from visionpeft.methods.parts.propagation import LearnedPrompts, travelling
from visionpeft.sites import Placement

START = 0.02


class PositionChange(nn.Module):
    """x + scale * A B on embedded tokens, A (tokens, rank) Kaiming-uniform with a = sqrt(5), B (rank, width) zero."""

    stackable = True

    def __init__(self, tokens: int, width: int, rank: int, scale: float):
        super().__init__()
        self.A = nn.Parameter(torch.empty(tokens, rank))
        self.B = nn.Parameter(torch.zeros(rank, width))
        self.scale = scale
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        if x.shape[1] != len(self.A):
            raise UnsupportedError(
                f"DecomposedPromptTuning changes {len(self.A)} positions, but there are {x.shape[1]} tokens; use "
                "images of the size it was attached for"
            )
        return x + (self.scale * (self.A @ self.B)).to(x.dtype)


class ShortPrompts(LearnedPrompts):
    """The prompts, which learn at a rate of their own where LoRA+ is asked for."""

    output_side = ("prompts",)


@dataclass(frozen=True)
class DecomposedPromptTuning(Method):
    """Few shallow prompts, and a low-rank change of all position embeddings: [class; P; patches] + scale * A B.

    A B (tokens, D) is added by position to the embedded tokens, class token included, before the norm that precedes the
    blocks where there is one; then P enters, and leaves after the last block. scale is alpha / sqrt(rank), as in the
    authors' code, or 1 without alpha, as in their text. A is Kaiming-uniform with a = sqrt(5), B zero, P N(0, 0.02^2).
    Called DePT in its paper, as is another method for CLIP (decoupled prompt tuning). The authors let P learn about a
    hundred times as fast: `--model.optimisation.lora_plus 100`.
    Not mergeable: it adds tokens. (A B alone could go into the position embedding.) It needs the grid of patches:
    images of another size than the model was built for are refused. Models for images of any size need `grid`, towers
    without patches are refused.
    Trainable with N tokens of width D: num_tokens D + rank (N + D); 23,080 on ViT-B/16.
    Source: Shi and Lipani, DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning, 2024, and the authors'
    code; published for language models alone.

    Args:
        num_tokens: prompts.
        rank: rank of the change of the position embeddings.
        alpha: numerator of the scale alpha / sqrt(rank); None for a scale of 1.
        dropout: dropout on the prompts.
        grid: rows and columns of patches, for a model that takes images of any size; None for the model's own.
        towers: which towers; by default the image tower.
    """

    num_tokens: int = 20
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    grid: tuple[int, int] | None = None
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_tokens", "rank"):
            value = getattr(self, name)
            require(value > 0, self, f"{name} must be a positive integer")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        positive = all(n > 0 for n in self.grid or ())
        require(positive, self, f"grid must be rows and columns of patches, not {self.grid!r}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """A `PositionChange` at `tokens`, prompts that enter the first block, their removal after the last."""
        rows, columns = grid_of(self, tower)
        scale = 1.0 if self.alpha is None else self.alpha / math.sqrt(self.rank)
        change = PositionChange(tower.num_prefix_tokens + rows * columns, tower.width, self.rank, scale)
        yield Placement(tower.name, None, "tokens", change)
        prompts = ShortPrompts(torch.randn(self.num_tokens, tower.width) * START, self.dropout)
        yield from travelling(self, tower, range(tower.depth), [prompts], self.num_tokens)
