"""MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts (Li et al., 2024).

https://arxiv.org/abs/2404.15159
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.errors import ConfigurationError
from visionpeft.methods.lora import LowRank
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require
from visionpeft.methods.parts.low_rank_experts import LowRankExperts
from visionpeft.methods.parts.router import Router
from visionpeft.methods.parts.targets import target_layers
from visionpeft.sites import Order, Placement

ATTENTION = ("q", "k", "v", "proj")
MLP = ("fc1", "fc2")


class Passing(threading.local):
    """What one pass through a block carries from the router to what follows, in its own thread.

    Attributes:
        choice: the shares of the chosen experts, which add up to 1, and which they are, both (batch, tokens, top).
    """

    choice: tuple[torch.Tensor, torch.Tensor] | None = None

    def __reduce__(self):
        return Passing, ()  # of a copy: it is in no pass


class Dispatch(nn.Module):
    """Gives the MLP every token `top` times, once for each of the experts with its largest shares.

    What follows in the block reads `passing.choice`, and `Collect` takes it away again. While training, `seen` holds
    what the balance is made of.
    """

    order = Order.LEAVE  # after all else that acts on what the MLP reads
    tokenwise = True
    multiplies_tokens = True

    def __init__(self, width: int, experts: int, top: int):
        super().__init__()
        self.router = Router(width, experts)
        self.top = top
        self.num_tokens = top - 1  # more for each, so that other rows of a batch would differ in length
        self.passing = Passing()
        self.seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"seen": None}  # of a copy: it belongs to one pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to (batch, tokens * top, width), those of one token one after another."""
        shares = self.router(x)
        largest, index = shares.topk(self.top, dim=-1)
        self.passing.choice = largest / largest.sum(dim=-1, keepdim=True), index
        self.seen = (shares, index) if self.training and torch.is_grad_enabled() else None
        return x.repeat_interleave(self.top, dim=1)

    def chosen(self) -> torch.Tensor:
        """Ones and zeros (batch, tokens * top, experts): the expert of each token of the MLP."""
        shares, index = self.passing.choice
        experts = len(self.router.weight)
        return nn.functional.one_hot(index.flatten(1), experts).to(shares.dtype)

    def imbalance(self) -> torch.Tensor:
        """experts * sum_e f_e P_e of the last pass in training mode, for the share f_e of the tokens that go to expert
        e and the mean P_e of its shares; `top` if all are used alike, which is the least.

        Raises:
            ConfigurationError: there was no such pass.
        """
        if self.seen is None:
            raise ConfigurationError(
                "MixLoRA's balance loss is that of a pass in training mode: call penalty after model.train() and the "
                "forward pass, or set balance to 0"
            )
        (shares, index), self.seen = self.seen, None
        experts = shares.shape[-1]
        used = nn.functional.one_hot(index, experts).sum(dim=-2).to(shares.dtype).flatten(0, -2).mean(dim=0)
        return experts * (used * shares.flatten(0, -2).mean(dim=0)).sum()


class Expert(LowRankExperts):
    """`LowRankExperts` of a layer of the MLP, of which each token has the one it was sent to."""

    def __init__(self, dispatch: Dispatch, *sizes):
        super().__init__(*sizes)
        self._dispatch = (dispatch,)  # in a tuple, because the adapter owns it once for the whole block

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (batch, tokens * top, in) and output y (batch, tokens * top, out) to the changed output."""
        return self.changed(x, y, self._dispatch[0].chosen())


class Collect(nn.Module):
    """The sum of what the experts of each token give, by their shares."""

    order = Order.ENTER  # before all else that acts on what the MLP gives
    tokenwise = True

    def __init__(self, dispatch: Dispatch):
        super().__init__()
        self._dispatch = (dispatch,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, tokens * top, width) to tokens (batch, tokens, width)."""
        passing = self._dispatch[0].passing
        (shares, _), passing.choice = passing.choice, None
        return (shares[..., None] * x.unflatten(1, shares.shape[1:])).sum(dim=2).to(x.dtype)


@dataclass(frozen=True)
class MixLoRA(Method):
    """Mixture of MLPs of which every token passes the best two: sum_e p_e MLP_e(h), MLP_e the frozen one with a LoRA.

    h is what the MLP reads, p = softmax(G h) over the experts; the `top` largest are kept and divided by their sum.
    MLP_e has W + (alpha / rank) B_e A_e for fc1 (both halves of a gated MLP) and fc2. So the frozen MLP is computed
    `top` times. Queries, keys, values and projection have one `LoRA` each, of the same rank. A is Kaiming-uniform with
    a = sqrt(5), B zero, G N(0, 0.02): no change at the start.
    To the loss is added balance * E sum_e f_e P_e, the mean over the blocks, with the share f_e of the tokens that go
    to expert e and the mean P_e of its p; as recalled from the paper, not read in its code, which was published for
    inference alone. The tasks do this by themselves, a training loop of your own with `penalty(model)`.
    Not mergeable: the experts depend on the token. It cannot be routed beside rows without it, nor act beside a method
    with a branch that reads what the MLP reads (`Convpass`).
    Trainable: per block, for each of q k v proj, rank * (in + out), for fc1 and fc2 experts * rank * (in + out), and
    experts * D; 13,049,856 on ViT-B/16, 6,561,792 for rank 8.
    Source: Li, Ma et al., MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts,
    2024; rank, alpha and dropout as recalled from the paper, balance and the router's start from the authors' code.

    Args:
        experts: number of low-rank changes of each layer of the MLP.
        top: how many of them a token passes; at least 2, as with one share, which is 1, the router would learn nothing.
        rank: rank of every change.
        alpha: numerator of the scale alpha / rank; None for a scale of 1.
        dropout: dropout on the input of A.
        balance: factor of the balance loss, 0 for none.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    experts: int = 8
    top: int = 2
    rank: int = 16
    alpha: float | None = 32
    dropout: float = 0.05
    balance: float = 0.001
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.rank > 0, self, "rank must be a positive integer")
        few = 2 <= self.top <= self.experts
        require(few, self, f"top must be from 2 to the number of experts, {self.experts}, not {self.top}")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        require(self.balance >= 0, self, f"balance must not be negative, but is {self.balance}")

    # What `target_layers` reads: it acts on all of them.
    @property
    def targets(self) -> tuple[str, ...]:
        """The layers with low-rank changes."""
        return ATTENTION + MLP

    def place(self, tower: Tower) -> Iterator[Placement]:
        """In every chosen block a `Dispatch` and a `Collect` around the MLP, and a low-rank change of each layer."""
        scaling = 1.0 if self.alpha is None else self.alpha / self.rank
        widths = {index: tower.blocks[index].width for index in blocks_of(self, tower)}
        dispatch = {index: Dispatch(width, self.experts, self.top) for index, width in widths.items()}
        for index, module in dispatch.items():
            yield Placement(tower.name, index, "mlp_in", module)
            yield Placement(tower.name, index, "mlp_out", Collect(module))
        for index, layer in target_layers(self, tower):
            sizes = layer.in_features, layer.out_features
            if layer.target in MLP:
                module = Expert(dispatch[index], *sizes, self.experts, self.rank, scaling, self.dropout)
            else:
                module = LowRank(*sizes, self.rank, scaling, self.dropout)
            yield Placement(tower.name, index, layer.site, module)

    def penalty(self, part: nn.Module) -> torch.Tensor | float:
        """balance * the mean imbalance of the blocks."""
        if self.balance == 0:
            return 0.0
        dispatches = [module for module in part.modules() if isinstance(module, Dispatch)]
        return self.balance * torch.stack([each.imbalance() for each in dispatches]).mean()
