"""Late Prompt Tuning: A Late Prompt Could Be Better Than Many Prompts (Liu et al., 2022).

https://arxiv.org/abs/2210.11292
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.base import Method, require, to_parameter_dtype
from visionpeft.methods.parts.grid import require_patches
from visionpeft.methods.parts.propagation import summary, travelling
from visionpeft.sites import Placement


class LateGenerator(nn.Module):
    """Prompts made from the tokens before a block by a bottleneck with PyTorch's default start.

    "class": dropout(up(relu(down h))) cut into num_tokens rows, h the class token, or without one the mean patch.
    "patches": dropout(up(pool(relu(down x)))) of all patches x, pool the means of num_tokens runs of them, row by row.
    """

    def __init__(self, width: int, num_tokens: int, bottleneck: int, reads: str, class_token: bool, dropout: float):
        super().__init__()
        self.num_tokens = num_tokens
        self.reads = reads
        self.class_token = class_token
        self.reads_all_patches = reads == "patches" or not class_token
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width * num_tokens if reads == "class" else width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """Map tokens (batch, tokens, width), whose patches begin at `first`, to prompts (batch, num_tokens, width)."""
        h = summary(x, self.class_token, first) if self.reads == "class" else x[:, first:]
        h = F.relu(self.down(to_parameter_dtype(h, self.down.weight)))
        if self.reads == "class":
            return self.dropout(self.up(h).unflatten(1, (self.num_tokens, -1)))
        return self.dropout(self.up(F.adaptive_avg_pool1d(h.mT, self.num_tokens).mT))


@dataclass(frozen=True)
class LPT(Method):
    """Late prompts: made from the image's own state in the middle of the network, and inserted there.

    Before block m a generator up(relu(down h)) turns the class token h (without one, the mean patch) into num_tokens
    prompts, which travel to the last block and leave after it. With reads="patches" each prompt is made from the mean
    of one run of patches after down, the paper's pooling generator. Nothing below block m changes or gets a gradient:
    that is what makes it cheap to train. Prompts are made from an image, so that text towers are refused. Linear layers
    start as PyTorch has them: not the backbone at the start. Not mergeable: it adds tokens.
    Trainable with h = bottleneck, l = num_tokens: D h + h + l (h D + D), 593,792 on ViT-B/16, whatever m; with
    reads="patches" D h + h + h D + D, 197,504.
    Source: Liu et al., Late Prompt Tuning: A Late Prompt Could Be Better Than Many Prompts, 2022, and the authors'
    code; published for language models alone.

    Args:
        num_tokens: prompts; 5 in the authors' code.
        bottleneck: width h of the generator.
        reads: "class" for the class token, or "patches" for runs of patches.
        start: the block m before which the prompts enter; None for half of them.
        dropout: dropout on the prompts.
        towers: which towers; by default the image tower.
    """

    num_tokens: int = 5
    bottleneck: int = 128
    reads: Literal["class", "patches"] = "class"
    start: int | None = None
    dropout: float = 0.0
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_tokens", "bottleneck"):
            value = getattr(self, name)
            require(value > 0, self, f"{name} must be a positive integer")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """Prompts of a `LateGenerator` that enter block m, and their removal after the last block."""
        require_patches(self, tower)
        start = tower.depth // 2 if self.start is None else self.start
        below = 0 <= start < tower.depth
        require(below, self, f"start must be a block of the {tower.name} tower, 0 to {tower.depth - 1}, not {start}")
        countable = self.num_tokens * tower.width < 2**63  # torch refuses other sizes in more than one sentence
        require(countable, self, f"{self.num_tokens} prompts are more than a tensor holds")
        source = LateGenerator(
            tower.width, self.num_tokens, self.bottleneck, self.reads, tower.class_token, self.dropout
        )
        yield from travelling(self, tower, range(start, tower.depth), [source], self.num_tokens)
