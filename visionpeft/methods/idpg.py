"""IDPG: An Instance-Dependent Prompt Generation Method (Wu et al., 2022), https://arxiv.org/abs/2204.04497."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require, to_parameter_dtype
from visionpeft.methods.parts.grid import require_patches
from visionpeft.methods.parts.propagation import summary, travelling
from visionpeft.sites import Placement, Shared

START = 0.05


class KroneckerLayer(nn.Module):
    """W x with W = sum_i A_i kron S_i, A (terms, terms, terms) and S (terms, out / terms, in / terms) N(0, 0.05^2)."""

    def __init__(self, terms: int, in_features: int, out_features: int):
        super().__init__()
        self.A = nn.Parameter(torch.randn(terms, terms, terms) * START)
        self.S = nn.Parameter(torch.randn(terms, out_features // terms, in_features // terms) * START)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in) to (batch, out) without the products."""
        parts = x.unflatten(1, (len(self.A), -1))
        inner = torch.einsum("bjp,iop->bijo", parts, self.S)
        return torch.einsum("iaj,bijo->bao", self.A, inner).flatten(1)


class KroneckerGenerator(nn.Module):
    """up(gelu(down(dropout(h)) + bias)) cut into num_tokens rows, of two `KroneckerLayer`; the bias is N(0, 0.05^2)."""

    def __init__(self, width: int, num_tokens: int, bottleneck: int, terms: int, dropout: float):
        super().__init__()
        self.num_tokens = num_tokens
        self.down = KroneckerLayer(terms, width, bottleneck)
        self.bias = nn.Parameter(torch.randn(bottleneck) * START)
        self.up = KroneckerLayer(terms, bottleneck, num_tokens * width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Map (batch, width) to prompts (batch, num_tokens, width)."""
        h = self.down(self.dropout(to_parameter_dtype(h, self.bias))) + self.bias
        return self.up(F.gelu(h)).unflatten(1, (self.num_tokens, -1))


class GeneratedPrompts(nn.Module):
    """A source of prompts: generator(h) + c, c (num_tokens, width) zero at the start.

    Args:
        generator: what makes them, one for all blocks.
        width: width of the tokens.
        class_token: whether h is the class token, or else the mean patch.
    """

    def __init__(self, generator: KroneckerGenerator, width: int, class_token: bool):
        super().__init__()
        self.c = nn.Parameter(torch.zeros(generator.num_tokens, width))
        self.class_token = class_token
        self.reads_all_patches = not class_token
        self._generator = (generator,)  # in a tuple, because the adapter owns it once for all blocks

    def forward(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """Map tokens (batch, tokens, width), whose patches begin at `first`, to prompts (batch, num_tokens, width)."""
        (generator,) = self._generator
        return generator(summary(x, self.class_token, first)) + self.c


@dataclass(frozen=True)
class IDPG(Method):
    """Prompts made from the image before every block, and added to those on their way: x_P <- x_P + G(h) + c_l.

    h is the class token before block l (without one, the mean patch), G(h) = up(gelu(down(dropout h) + b)) one
    generator for all blocks and c_l (num_tokens, D) a bias of each. Both matrices are sums of `terms` Kronecker
    products, sum_i A_i kron S_i with A_i (terms, terms). The prompts of the first block enter after the prefix tokens;
    after the last block they leave.
    In the authors' code the first block's h is the class token at the end of a first, unprompted pass. Here there is
    one pass: before block 0, where the class token is the same for all images, h is the mean patch. A and S and b are
    N(0, 0.05^2) as there; c is zero, which is our choice. Prompts are made from an image, so that text towers are
    refused. Not mergeable: it adds tokens.
    Trainable on L blocks of width D with h = bottleneck, l = num_tokens, n = terms: (D h + h l D) / n + h + 2 n^3 +
    L l D; 58,896 on ViT-B/16.
    Source: Wu et al., IDPG: An Instance-Dependent Prompt Generation Method, 2022, and the authors' code; published for
    language models alone.

    Args:
        num_tokens: prompts.
        bottleneck: width h of the generator.
        terms: number n of Kronecker products; divides the width of the tokens and h.
        dropout: dropout on what the generator reads.
        blocks: which blocks, consecutive, such as "all", "last:4" or "3:9".
        towers: which towers; by default the image tower.
    """

    num_tokens: int = 5
    bottleneck: int = 16
    terms: int = 16
    dropout: float = 0.0
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_tokens", "bottleneck", "terms"):
            value = getattr(self, name)
            require(value > 0, self, f"{name} must be a positive integer")
        divides = self.bottleneck % self.terms == 0
        require(divides, self, f"bottleneck {self.bottleneck} must be a multiple of terms {self.terms}")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")

    def place(self, tower: Tower) -> Iterator[Placement | Shared]:
        """The generator, prompts that enter the first chosen block and leave the last, more added before the others."""
        require_patches(self, tower)
        divides = tower.width % self.terms == 0
        require(divides, self, f"terms={self.terms} does not divide the width {tower.width} of the {tower.name} tower")
        blocks = blocks_of(self, tower)
        generator = KroneckerGenerator(tower.width, self.num_tokens, self.bottleneck, self.terms, self.dropout)
        yield Shared(tower.name, "generator", generator)
        sources = [GeneratedPrompts(generator, tower.width, tower.class_token and index > 0) for index in blocks]
        yield from travelling(self, tower, blocks, sources, self.num_tokens, keep=1.0, add=1.0)
