"""SMoP: Towards Efficient and Effective Prompt Tuning with Sparse Mixture-of-Prompts (Choi et al., 2023).

https://aclanthology.org/2023.emnlp-main.884
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require, to_parameter_dtype
from visionpeft.methods.parts.grid import require_patches
from visionpeft.methods.parts.propagation import travelling
from visionpeft.sites import Placement

START = 0.02


class RoutedPrompts(nn.Module):
    """A source of prompts p_e P_e, of which each image has the one with the largest p = softmax(W m), m its mean patch.

    P (experts, num_tokens, width) is N(0, 0.02^2), W (experts, width) orthogonal. While training, W m is multiplied by
    1 + noise * epsilon, epsilon N(0, 1) for each image and expert.
    """

    reads_all_patches = True

    def __init__(self, experts: int, num_tokens: int, width: int, noise: float):
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(experts, num_tokens, width) * START)
        # float32, whatever the default: PyTorch has no QR decomposition in lower precision
        self.router = nn.Parameter(nn.init.orthogonal_(torch.empty(experts, width, dtype=torch.float32)))
        self.noise = noise

    def forward(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """Map tokens (batch, tokens, width), whose patches begin at `first`, to prompts (batch, num_tokens, width)."""
        scores = F.linear(to_parameter_dtype(x[:, first:].mean(dim=1), self.router), self.router)
        if self.training and self.noise:
            scores = scores * (1 + self.noise * torch.randn_like(scores))
        share, chosen = scores.softmax(dim=-1).max(dim=-1)
        return share[:, None, None] * self.prompts[chosen]


@dataclass(frozen=True)
class SMoP(Method):
    """Several short sets of shallow prompts, of which every image gets one: p_e P_e for the largest p = softmax(W m).

    m is the mean of the embedded patches. The prompts of the set are multiplied by its share, about 1 / experts at the
    start, which is how the router W learns; they enter the first chosen block and leave after the last. As in the
    authors' code there is no loss that balances the sets (it is computed there, but not used), and while training the
    scores W m are multiplied by 1 + epsilon, epsilon N(0, 1). P is N(0, 0.02^2), which is our choice (there, words), W
    orthogonal. With one set it is `VPT(deep=False)`. Prompts are chosen by an image, so that text towers are refused.
    Not mergeable: it adds tokens.
    Trainable: experts * (num_tokens + 1) * D; 18,432 on ViT-B/16.
    Source: Choi et al., SMoP: Towards Efficient and Effective Prompt Tuning with Sparse Mixture-of-Prompts, 2023, and
    the authors' code; published for language models alone.

    Args:
        experts: number of sets.
        num_tokens: prompts of a set.
        noise: standard deviation of epsilon; 0 for none.
        blocks: which blocks, consecutive, such as "all", "last:4" or "3:9".
        towers: which towers; by default the image tower.
    """

    experts: int = 4
    num_tokens: int = 5
    noise: float = 1.0
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("experts", "num_tokens"):
            value = getattr(self, name)
            require(value > 0, self, f"{name} must be a positive integer")
        require(self.noise >= 0, self, f"noise must not be negative, but is {self.noise}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """Prompts that enter the first chosen block and leave the last."""
        require_patches(self, tower)
        source = RoutedPrompts(self.experts, self.num_tokens, tower.width, self.noise)
        yield from travelling(self, tower, blocks_of(self, tower), [source], self.num_tokens)
