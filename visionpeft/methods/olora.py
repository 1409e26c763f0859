"""OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models (Büyükakyüz, 2024), https://arxiv.org/abs/2406.01775."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.pissa import StartsFromWeight


@dataclass(frozen=True)
class OLoRA(StartsFromWeight):
    """LoRA that starts from orthonormal columns: W + s (B A - Q_r R_r), the first r of W = Q R, with B = Q_r, A = R_r.

    s = alpha / rank, and the decomposition is without pivoting: Q_r (out, r) are orthonormal columns, R_r (r, in) the
    rows of R. Nothing changes at the start, to the bit. As in `PiSSA`, the backbone is never written, where published
    code writes W - s Q_r R_r into it; `save` writes the change as `LoRA` of twice the rank, which peft reads after
    `export_peft`. q, k and v have decompositions of their own. Mergeable.
    Trainable: sum over target layers of rank * (in + out), as LoRA; 294,912 on ViT-B/16 for rank 8 on q and v.
    Source: Büyükakyüz, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, 2024.

    Args:
        rank: rank r of the change.
        alpha: numerator of the scale alpha / rank; None for a scale of 1.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        dropout: dropout on the input of the change, what is counted from included.
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

    def factors(self, weight: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Q_r and R_r."""
        left, right = torch.linalg.qr(weight)
        return left[:, :rank], right[:rank]
