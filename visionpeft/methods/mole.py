"""MoLE: Mixture of LoRA Experts (Wu et al., 2024), https://arxiv.org/abs/2404.13628."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.errors import ConfigurationError
from visionpeft.methods.lora import LoRA, LowRank
from visionpeft.methods.parts.base import Method, require, to_parameter_dtype
from visionpeft.methods.parts.frozen_sources import Frozen, OverAdapters, weighted
from visionpeft.methods.parts.router import Router
from visionpeft.sites import Order, Placement


class GatedChanges(nn.Module):
    """y + sum_n p_n d_n with the frozen low-rank changes d_n = s_n B_n A_n x and p = router(norm([d_1; ...; d_N])).

    While training, `seen` holds the shares of the last pass.
    """

    stackable = True
    order = Order.WEIGHT

    def __init__(self, changes: Sequence[LowRank]):
        super().__init__()
        self.frozen = Frozen(changes)
        self.router = Router(len(changes) * len(changes[0].B), len(changes))
        self.seen: torch.Tensor | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"seen": None}  # of a copy: it belongs to one pass

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (..., in) and output y (..., out) of the layer to the changed output (..., out)."""
        x = to_parameter_dtype(x, self.frozen[0].A)
        changes = [each.scaling * F.linear(F.linear(x, each.A), each.B) for each in self.frozen]
        together = torch.cat(changes, dim=-1)
        shares = self.router(F.layer_norm(together, together.shape[-1:]))
        self.seen = shares if self.training and torch.is_grad_enabled() else None
        return y + weighted(changes, shares).to(y.dtype)

    def imbalance(self) -> torch.Tensor:
        """-sum_n log of the mean share of change n over the last pass in training mode; least, N log N, if all are 1/N.

        Raises:
            ConfigurationError: there was no such pass.
        """
        if self.seen is None:
            raise ConfigurationError(
                "MoLE's balance loss is that of a pass in training mode: call penalty after model.train() and the "
                "forward pass, or set balance to 0"
            )
        shares, self.seen = self.seen, None
        return -shares.flatten(0, -2).mean(dim=0).log().sum()


@dataclass(frozen=True)
class MoLE(OverAdapters):
    """Gates over the low-rank changes of several trained LoRAs, which stay frozen: W x + sum_n p_n s_n B_n A_n x.

    At every target layer the shares of a token are p = softmax(G norm([d_1; ...; d_N])), read from the changes
    d_n = s_n B_n A_n x themselves, normalised together without scale and shift; G (N, N * out) is N(0, 0.02): near
    their mean at the start. The paper reads all tokens of a sequence together, which fixes their number, and has its
    gates on whole blocks; here each token has shares of its own at each layer, with which one adapter is that adapter.
    To the loss is added balance * the mean over layers of -sum_n log q_n, q_n the mean share of adapter n in the batch.
    As recalled from the paper, whose code was not published. The tasks do this by themselves, a training loop of your
    own with `penalty(model)`.

    The adapters are `LoRA` of the same targets and blocks, of any rank and scale (`AdaLoRA` counts as the LoRA it is
    saved as). They are copied: the new adapter is saved with them, and they need not stay attached, nor act beside it.
    Not mergeable: the shares depend on the token.
    Trainable: sum over target layers of N^2 * out; 73,728 on ViT-B/16 for two adapters on q and v.
    Source: Wu, Huang and Wei, Mixture of LoRA Experts, 2024.

    Args:
        adapters: names of the attached LoRAs; on the command line, the folders of saved ones.
        balance: factor of the balance loss, 0 for none.
        towers: which towers, "visual" or "text" or both; by default the image tower.
        sources: class and fields of the adapters' methods; found by `attach`, not to be given.
    """

    kinds: ClassVar[tuple[type[Method], ...]] = (LoRA,)

    balance: float = 0.5
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.balance >= 0, self, f"balance must not be negative, but is {self.balance}")

    def mix(self, modules: Sequence[nn.Module], placement: Placement) -> GatedChanges:
        """One `GatedChanges` at every target layer."""
        linear = placement.site != "patch_embed"
        require(linear, self, "LoRA on patch_embed is a convolution, over which there are no gates; train it without")
        return GatedChanges(modules)

    def penalty(self, part: nn.Module) -> torch.Tensor | float:
        """balance * the mean imbalance of the layers."""
        if self.balance == 0:
            return 0.0
        gates = [module for module in part.modules() if isinstance(module, GatedChanges)]
        return self.balance * torch.stack([each.imbalance() for each in gates]).mean()
