"""PiSSA: Principal Singular Values and Singular Vectors Adaptation (Meng et al., 2024).

https://arxiv.org/abs/2404.02948
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn as nn

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.quantised import full_precision
from visionpeft.backbones.tower import Tower
from visionpeft.methods.lora import LoRA, LowRank
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.targets import ranked_layers, require_low_rank
from visionpeft.methods.parts.trees import tree_of
from visionpeft.sites import Placement


class CountedFromStart(LowRank):
    """y + scaling * (U V - U0 V0) dropout(x): a low-rank change counted from where U and V start.

    U (out, rank) and V (rank, in) start as U0 and V0, which stay as buffers. As U V - U0 V0 = U (V - V0) + (U - U0) V0,
    it is `LowRank` of twice the rank, with B = [U, U - U0] and A = [V - V0; V0]: exactly nothing at the start, and
    without the rounding of a difference of two large products.
    """

    output_side = ("U",)

    def __init__(self, U: torch.Tensor, V: torch.Tensor, scaling: float, dropout: float):
        nn.Module.__init__(self)  # A and B are no parameters here
        self.U, self.V = nn.Parameter(U), nn.Parameter(V)
        self.register_buffer("U_start", U.clone())
        self.register_buffer("V_start", V.clone())
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)

    @property
    def A(self) -> torch.Tensor:
        """[V - V0; V0] (2 rank, in)."""
        return torch.cat((self.V - self.V_start, self.V_start))

    @property
    def B(self) -> torch.Tensor:
        """[U, U - U0] (out, 2 rank)."""
        return torch.cat((self.U, self.U - self.U_start), dim=1)

    def low_rank(self) -> LowRank:
        """The same change with A and B as parameters."""
        rank = 2 * len(self.V)
        change = LowRank(self.V.shape[1], len(self.U), rank, self.scaling, self.dropout.p).to(self.U)
        change.A.data, change.B.data = self.A.detach(), self.B.detach()
        return change


class Counting(Method):
    """Base of LoRA whose change is counted from where its factors start.

    A subclass is a dataclass with the fields of `LoRA` and says where that is.
    """

    def __post_init__(self):
        super().__post_init__()
        require_low_rank(self)

    @abstractmethod
    def start(self, layer: Layer, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """U (out, rank) and V (rank, in) at the start, in single or double precision."""

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `CountedFromStart` at every target layer of the chosen blocks."""
        for index, layer, rank, scaling in ranked_layers(self, tower):
            with torch.no_grad():
                U, V = self.start(layer, rank, scaling)
            module = CountedFromStart(U.contiguous(), V.contiguous(), scaling, self.dropout)
            yield Placement(tower.name, index, layer.site, module)

    def fold(self, part: nn.Module) -> tuple[LoRA, nn.Module]:
        """LoRA of twice the rank."""
        modules = {path: module for path, module in part.named_modules() if isinstance(module, CountedFromStart)}
        lora = LoRA(
            rank=2 * self.rank,
            alpha=None if self.alpha is None else 2 * self.alpha,
            targets=self.targets,
            dropout=self.dropout,
            overrides={key: 2 * rank for key, rank in self.overrides.items()},
            blocks=self.blocks,
            towers=self.towers,
        )
        return lora, tree_of({path: module.low_rank() for path, module in modules.items()})


class StartsFromWeight(Counting):
    """Base of those that start as a part of the weight."""

    @abstractmethod
    def factors(self, weight: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """U (out, rank) and V (rank, in) at the start, of a weight (out, in) in single or double precision."""

    def start(self, layer: Layer, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of the weight of the layer."""
        weight = full_precision(layer.matrix)
        weight = weight if weight.dtype == torch.float64 else weight.float()
        most = min(weight.shape)
        require(rank <= most, self, f"{layer.target} has {most} components, so its rank cannot be {rank}")
        return self.factors(weight, rank, scaling)


@dataclass(frozen=True)
class PiSSA(StartsFromWeight):
    """LoRA that trains the principal part of each weight: W + s (B A - B0 A0), s B0 A0 its best part of rank r.

    With W = U S V^T and s = alpha / rank, B0 = U_r sqrt(S_r / s) and A0 = sqrt(S_r / s) V_r^T; B and A start there, so
    that nothing changes at the start, to the bit. q, k and v have decompositions of their own, also where the backbone
    keeps them in one matrix. Published code writes W - s B0 A0 into the backbone and remembers only how it was made;
    here the backbone is never written, and `save` writes the change as `LoRA` of twice the rank, which depends on no
    decomposition being made again: signs, equal singular values and peft's randomised ones differ from one time to the
    next. What is loaded is that LoRA; peft reads it after `export_peft`. Mergeable. Weight decay pulls A and B to
    zero, and so the principal part of the weight, as in the published code.
    Trainable: sum over target layers of rank * (in + out), as LoRA; 294,912 on ViT-B/16 for rank 8 on q and v.
    Source: Meng et al., PiSSA: Principal Singular Values and Singular Vectors Adaptation, 2024.

    Args:
        rank: rank r of the part that is trained.
        alpha: numerator of the scale alpha / rank; None for a scale of 1, as in the paper (alpha = rank).
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        dropout: dropout on the input of the change, what is counted from included; none in the paper.
        overrides: other ranks for some blocks or targets, such as {"fc1": 4, "last:4": 16, "first:2/q": 2}.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    overrides: dict[str, int] = field(default_factory=dict)
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        positive = self.alpha is None or self.alpha > 0
        require(positive, self, f"alpha must be positive, because the start is divided by it, not {self.alpha}")

    def factors(self, weight: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """U_r sqrt(S_r / s) and sqrt(S_r / s) V_r^T."""
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        root = (values[:rank] / scaling).sqrt()
        return left[:, :rank] * root, root[:, None] * right[:rank]
