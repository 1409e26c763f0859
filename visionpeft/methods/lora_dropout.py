"""LoRA Dropout as a Sparsity Regularizer for Overfitting Control (Lin et al., 2024), https://arxiv.org/abs/2404.09610."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from visionpeft.backbones.tower import Tower
from visionpeft.methods.lora import LowRank
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, to_parameter_dtype
from visionpeft.methods.parts.targets import ranked_layers, require_low_rank
from visionpeft.sites import Placement


class SparseLowRank(LowRank):
    """`LowRank` whose A loses input features and whose B loses output features while training, never a rank.

    One draw of each for the whole batch; what is kept is scaled by 1 / (1 - dropout).
    """

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (..., in) and output y (..., out) of the layer to the changed output (..., out)."""
        A, B, scaling = self.low_rank_change()
        z = scaling * F.linear(to_parameter_dtype(x, A), A)
        return y + F.linear(z, B).to(y.dtype)

    def low_rank_change(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A and B with the drawn columns and rows left out, and alpha / rank."""
        kept_in = self.dropout(torch.ones_like(self.A[0]))
        kept_out = self.dropout(torch.ones_like(self.B[:, 0]))
        return self.A * kept_in, self.B * kept_out[:, None], self.scaling


@dataclass(frozen=True)
class LoRADropout(Method):
    """LoRA that loses whole input features of A and output features of B at random while training, never a rank.

    W + (alpha / rank) diag(n) B A diag(m), m and n drawn once for each layer and forward pass, for the whole batch, and
    scaled by 1 / (1 - dropout), so that the mean of each factor is what acts after training. A re-implementation leaves
    out the scale: with a dropout of one half the change is four times as large without it as in the mean with it. The
    paper averages predictions of several draws as an option; that is not built. As A and B alone are masked, it costs
    no memory, where dropout on the input of `LoRA` does. B is zero: no change at the start. Mergeable.
    Trainable: sum over target layers of rank * (in + out), as LoRA; 294,912 on ViT-B/16 for rank 8 on q and v.
    Source: Lin et al., LoRA Dropout as a Sparsity Regularizer for Overfitting Control, 2024; the authors' code was not
    found.

    Args:
        rank: rank r of the change.
        alpha: numerator of the scale alpha / rank; None for a scale of 1.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        dropout: share of features left out.
        overrides: other ranks for some blocks or targets, such as {"fc1": 4, "last:4": 16, "first:2/q": 2}.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.5
    overrides: dict[str, int] = field(default_factory=dict)
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require_low_rank(self)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `SparseLowRank` at every target layer of the chosen blocks."""
        for index, layer, rank, scaling in ranked_layers(self, tower):
            module = SparseLowRank(layer.in_features, layer.out_features, rank, scaling, self.dropout)
            yield Placement(tower.name, index, layer.site, module)
