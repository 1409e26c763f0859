"""Compacter: Efficient Low-Rank Hypercomplex Adapter Layers (Mahabadi et al., 2021), https://arxiv.org/abs/2106.04647."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.errors import ConfigurationError
from visionpeft.methods.adapter import PLACEMENTS
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require, to_parameter_dtype
from visionpeft.methods.parts.bottleneck import ACTIVATIONS
from visionpeft.methods.parts.kronecker_sum import Rule, kronecker_sum
from visionpeft.sites import Placement, Shared

SERIAL = ("houlsby", "pfeiffer")
START = 1e-4  # phm_init_range of the released configurations; the code's own default is 0.01


class KroneckerLinear(nn.Module):
    """sum_i (A_i kron u_i^T v_i) x + bias with shared A_i.

    u (terms, rank, out / terms) and v (terms, rank, in / terms) are Glorot-uniform with gain sqrt(2), the bias is zero.
    """

    def __init__(self, rule: Rule, in_features: int, out_features: int, rank: int):
        super().__init__()
        terms = len(rule.A)
        self._rule = (rule,)  # in a tuple, because the adapter owns it once for all layers
        self.u = nn.Parameter(torch.empty(terms, rank, out_features // terms))
        self.v = nn.Parameter(torch.empty(terms, rank, in_features // terms))
        self.bias = nn.Parameter(torch.zeros(out_features))
        for matrix in (*self.u, *self.v):
            nn.init.xavier_uniform_(matrix, gain=math.sqrt(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        return kronecker_sum(self._rule[0].A, self.u, self.v, x) + self.bias


class CompactBottleneck(nn.Module):
    """x + up(dropout(act(down x))) with two `KroneckerLinear`."""

    stackable = True
    tokenwise = True

    def __init__(self, rule: Rule, width: int, bottleneck: int, rank: int, activation: str, dropout: float):
        super().__init__()
        self.down = KroneckerLinear(rule, width, bottleneck, rank)
        self.act = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.up = KroneckerLinear(rule, bottleneck, width, rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        h = self.dropout(self.act(self.down(to_parameter_dtype(x, self.down.bias))))
        return x + self.up(h).to(x.dtype)


@dataclass(frozen=True)
class Compacter(Method):
    """Bottleneck adapters x + up(act(down x)) whose matrices are sums of Kronecker products: sum_i A_i kron u_i^T v_i.

    The small matrices A_i (terms x terms) are shared by all adapters of a tower. houlsby acts on the outputs of
    attention and MLP, before layer scale and residual, pfeiffer on that of the MLP only (Compacter++). A is N(0,
    0.0001), u and v are Glorot-uniform with gain sqrt(2), biases zero, as in the authors' released configurations: very
    near the backbone at the start, but not equal to it.
    The authors train the LayerNorms of the blocks as well: `vp.attach(model, Compacter(), train=["*norm*"])`, on the
    command line `--model.train "[*norm*]"`, as the shipped configurations do. Not mergeable: it is not linear.
    Trainable on L blocks of width D and bottleneck h: terms^3 + L (2 rank (D + h) + h + D) for one adapter per block,
    2 L instead of L for houlsby; 57,088 and 28,576 on ViT-B/16.
    Source: Mahabadi et al., Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, 2021, and the authors' code.

    Args:
        bottleneck: width h; the paper has D / 32.
        terms: number of Kronecker products, and rows and columns of A_i; divides D and h.
        rank: rank of each u_i^T v_i.
        placement: "houlsby" or "pfeiffer".
        activation: gelu, relu, silu or identity.
        dropout: dropout in the bottleneck.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    bottleneck: int = 24
    terms: int = 4
    rank: int = 1
    placement: str = "houlsby"
    activation: str = "gelu"
    dropout: float = 0.0
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("bottleneck", "terms", "rank"):
            value = getattr(self, name)
            require(value > 0, self, f"{name} must be a positive integer")
        divides = self.bottleneck % self.terms == 0
        require(divides, self, f"bottleneck {self.bottleneck} must be a multiple of terms {self.terms}")
        for name, allowed in (("placement", SERIAL), ("activation", ACTIVATIONS)):
            value = getattr(self, name)
            require(value in allowed, self, f"{name} must be one of {', '.join(allowed)}, not {value!r}")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")

    def place(self, tower: Tower) -> Iterator[Placement | Shared]:
        """The shared matrices, and one or two `CompactBottleneck` in every chosen block."""
        rule = Rule(self.terms, std=START)
        yield Shared(tower.name, "rule", rule)
        for index in blocks_of(self, tower):
            width = tower.blocks[index].width
            if width % self.terms:
                raise ConfigurationError(
                    f"Compacter: terms={self.terms} does not divide the width {width} of the {tower.name} tower"
                )
            for site, _ in PLACEMENTS[self.placement]:
                module = CompactBottleneck(rule, width, self.bottleneck, self.rank, self.activation, self.dropout)
                yield Placement(tower.name, index, site, module)
