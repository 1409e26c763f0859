"""MoLORA: Pushing Mixture of Experts to the Limit (Zadouri et al., 2023), https://arxiv.org/abs/2309.05444."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.low_rank_experts import LowRankExperts
from visionpeft.methods.parts.router import Router
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.sites import Placement


class MixedLowRank(LowRankExperts):
    """`LowRankExperts`, each token of whose input x has the shares router(x)."""

    stackable = True

    def __init__(self, in_features: int, out_features: int, experts: int, rank: int, scaling: float, dropout: float):
        super().__init__(in_features, out_features, experts, rank, scaling, dropout, std=0.02)
        self.router = Router(in_features, experts)

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (..., in) and output y (..., out) of the layer to the changed output (..., out)."""
        return self.changed(x, y, self.router(x))


@dataclass(frozen=True)
class MoLORA(Method):
    """Mixture of low-rank changes that every token weighs for itself: W x + (alpha / rank) sum_e p_e B_e A_e x.

    The shares are p = softmax(G x), with a router G (experts, in) at every target. All experts act on every token.
    A_e (rank, in) and G are N(0, 0.02), B_e (out, rank) is zero: no change at the start. There is no balance loss.
    Not mergeable: the shares depend on the token. With one expert it is `LoRA`.
    Trainable: sum over target layers of experts * (rank * (in + out) + in); 7,464,960 on ViT-B/16, 1,658,880 on q and v
    alone.
    Source: Zadouri et al., Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient MoE for Instruction
    Tuning, 2023, and the authors' code (for-ai/parameter-efficient-moe), whose targets, scale and numbers the defaults
    are.

    Args:
        experts: number of low-rank changes of each target.
        rank: rank of each.
        alpha: numerator of the scale alpha / rank; None for a scale of 1.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        dropout: dropout on the input of A, not on that of the router; the authors have none.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    experts: int = 10
    rank: int = 4
    alpha: float | None = 16
    targets: tuple[str, ...] = ("q", "k", "v", "proj", "fc1", "fc2")
    dropout: float = 0.0
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("experts", "rank"):
            value = getattr(self, name)
            require(value > 0, self, f"{name} must be a positive integer")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        require_targets(self)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `MixedLowRank` at every target layer of the chosen blocks."""
        scaling = 1.0 if self.alpha is None else self.alpha / self.rank
        for index, layer in target_layers(self, tower):
            module = MixedLowRank(layer.in_features, layer.out_features, self.experts, self.rank, scaling, self.dropout)
            yield Placement(tower.name, index, layer.site, module)
