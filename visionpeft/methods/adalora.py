"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (Zhang et al., 2023).

https://arxiv.org/abs/2303.10512
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn as nn

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Tower
from visionpeft.errors import ConfigurationError
from visionpeft.methods.lora import LoRA, LowRank
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.methods.parts.trees import tree_of
from visionpeft.sites import Placement

TRIPLET = ("P", "values", "Q")


class Triplets(LowRank):
    """y + scaling * P diag(values) Q dropout(x): `LowRank` with B = P and A = diag(values) Q.

    P (out, rank) and Q (rank, in) are N(0, 0.02), the singular values (rank,) zero: no change at the start. Triplet i
    is column i of P, value i and row i of Q. Buffers hold, for every entry w, the smoothed sensitivity |w dL/dw| and
    its smoothed variation, and which triplets are `kept` (rank,), as ones and zeros.
    """

    output_side = ("P",)

    def __init__(self, layer: Layer, rank: int, scaling: float, dropout: float):
        nn.Module.__init__(self)  # A and B are no parameters here
        self.P = nn.Parameter(torch.randn(layer.out_features, rank) * 0.02)
        self.values = nn.Parameter(torch.zeros(rank))
        self.Q = nn.Parameter(torch.randn(rank, layer.in_features) * 0.02)
        self.target = layer.target
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        for name in TRIPLET:
            for state in ("sensitivity", "variation"):
                self.register_buffer(f"{name}_{state}", torch.zeros_like(getattr(self, name)))
        self.register_buffer("kept", torch.ones(rank))

    @property
    def A(self) -> torch.Tensor:
        """diag(values) Q (rank, in)."""
        return self.values[:, None] * self.Q

    @property
    def B(self) -> torch.Tensor:
        """P (out, rank)."""
        return self.P

    def deviations(self) -> list[torch.Tensor]:
        """|P^T P - I| and |Q Q^T - I|, Frobenius norms: how far the factors are from orthogonal."""
        with torch.autocast(self.P.device.type, enabled=False):
            identity = torch.eye(len(self.values), dtype=self.P.dtype, device=self.P.device)
            return [torch.linalg.matrix_norm(c - identity) for c in (self.P.t() @ self.P, self.Q @ self.Q.t())]

    def gradients_are_finite(self) -> torch.Tensor:
        """Whether the gradients of the step just made are numbers, as a tensor () on their device.

        Raises:
            ConfigurationError: they are gone already.
        """
        return torch.stack([self._gradient(name).isfinite().all() for name in TRIPLET]).all()

    def _gradient(self, name: str) -> torch.Tensor:
        gradient = getattr(self, name).grad
        if gradient is None:
            raise ConfigurationError(
                "AdaLoRA measures gradients after a step: call after_step between optimizer.step() and zero_grad()"
            )
        return gradient

    def measure(self, beta1: float, beta2: float, made: torch.Tensor) -> None:
        """Follow the sensitivity of every entry, from the gradients of the step just made, if it was `made` ()."""
        for name in TRIPLET:
            now = (getattr(self, name) * self._gradient(name)).abs()
            old = getattr(self, f"{name}_sensitivity")
            sensitivity = old.lerp(now, 1 - beta1)
            variation = getattr(self, f"{name}_variation")
            variation.copy_(torch.where(made, variation.lerp((now - sensitivity).abs(), 1 - beta2), variation))
            old.copy_(torch.where(made, sensitivity, old))

    def importance(self) -> torch.Tensor:
        """Of each triplet (rank,): s(value) + mean s(column of P) + mean s(row of Q), s = sensitivity * variation."""
        of_P, of_values, of_Q = (
            getattr(self, f"{name}_sensitivity") * getattr(self, f"{name}_variation") for name in TRIPLET
        )
        return of_values + of_P.mean(dim=0) + of_Q.mean(dim=1)

    def acting(self) -> torch.Tensor:
        """Which triplets are kept, or have a value until the next choice: (rank,)."""
        return (self.kept > 0) | (self.values != 0)

    def low_rank(self, rank: int) -> LowRank:
        """The same change with this rank, which is not below the number of triplets that act, and a scale of 1."""
        chosen = (~self.acting()).to(torch.uint8).argsort(stable=True)[:rank].sort().values
        change = LowRank(self.Q.shape[1], len(self.P), rank, 1.0, self.dropout.p).to(self.P)
        change.A.data = self.scaling * self.A.detach()[chosen]
        change.B.data = self.P.detach()[:, chosen].contiguous()
        return change


@dataclass(frozen=True)
class AdaLoRA(Method):
    """Low-rank changes W + P diag(values) Q whose ranks are chosen while training, under one budget for all layers.

    Every step adds orthogonality * mean (|P^T P - I|, |Q Q^T - I|) to the loss, the mean over all P and Q of Frobenius
    norms, and follows the importance of every triplet (column of P, singular value, row of Q): the smoothed sensitivity
    |w dL/dw| times its smoothed variation. Between `start` and `end`, every `interval` steps only the most important
    triplets keep their value, the others' is set to zero, from which they may grow again until the next time; their
    number falls along b1 + (b0 - b1) (1 - progress)^3, rounded down, from b0 = initial_rank to b1 = rank, both times
    the number of layers. From `end` on the choice is fixed. As in the authors' code, |w dL/dw| has w after the step and
    the gradient before it. Steps whose gradients are not finite, which a gradient scaler skips, are not followed.

    Formula and code: the paper writes the penalty as the *sum* of *squared* norms. The authors' code and peft take the
    mean of the norms, with which every published weight was chosen; it is what this does. On ViT-B/16 at the start the
    formula would be 71.1 instead of 0.214 and outweigh the task's gradient, so that ranks follow the penalty.

    The tasks do this by themselves, and checkpoints hold the state. A training loop of your own must add
    `penalty(model)` to the loss and call `after_step(model, step, total_steps)` between `optimizer.step()` and
    `zero_grad()`. `save` writes the triplets that act as `LoRA` of those ranks, without the state. Mergeable.
    Trainable: sum over target layers of initial_rank * (in + out + 1); 1,991,520 on ViT-B/16.
    Source: Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, 2023, its penalty and
    rounding as in the authors' code (QingruZhang/AdaLoRA) and in peft.

    Args:
        rank: average rank at the end.
        initial_rank: rank of every layer at the start; the paper has 1.5 times the final one.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        dropout: dropout on the input of Q.
        orthogonality: factor of the penalty.
        start: share of all steps after which the budget begins to fall.
        end: share of all steps after which the choice is fixed.
        interval: steps from one choice to the next.
        beta1: smoothing of the sensitivity.
        beta2: smoothing of its variation.
        alpha: numerator of a scale alpha / initial_rank of the change, as in the authors' code, where it stays the same
            while ranks fall; None for a scale of 1.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both, under one budget; by default the image tower.
    """

    rank: int = 8
    initial_rank: int = 12
    targets: tuple[str, ...] = ("q", "k", "v", "proj", "fc1", "fc2")
    dropout: float = 0.0
    orthogonality: float = 0.1
    start: float = 0.1
    end: float = 0.7
    interval: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    alpha: float | None = None
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("rank", "initial_rank", "interval"):
            value = getattr(self, name)
            require(value > 0, self, f"{name} must be a positive integer")
        require(self.rank <= self.initial_rank, self, "initial_rank must not be below rank")
        require(0 <= self.start < self.end <= 1, self, f"0 <= start < end <= 1, not {self.start} and {self.end}")
        for name in ("dropout", "beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, self, f"{name} must be in [0, 1), not {getattr(self, name)}")
        require(self.orthogonality >= 0, self, "orthogonality must not be negative")
        require_targets(self)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `Triplets` at every target layer of the chosen blocks."""
        for index, layer in target_layers(self, tower):
            scaling = 1.0 if self.alpha is None else self.alpha / self.initial_rank
            module = Triplets(layer, self.initial_rank, scaling, self.dropout)
            yield Placement(tower.name, index, layer.site, module)

    def penalty(self, part: nn.Module) -> torch.Tensor:
        """orthogonality * mean of |P^T P - I| and |Q Q^T - I| over all layers."""
        norms = [norm for layer in _triplets_of(part).values() for norm in layer.deviations()]
        return self.orthogonality * torch.stack(norms).mean()

    def after_step(self, part: nn.Module, step: int, total_steps: int) -> None:
        """Follow the importance and keep as many triplets as the budget of the step allows."""
        layers = list(_triplets_of(part).values())
        # A step that a gradient scaler skipped was not made, and says nothing of importance: one infinite value would
        # stay in the smoothed statistics for good. The question is answered on the device, for which nobody waits.
        made = torch.stack([layer.gradients_are_finite() for layer in layers]).all()
        for layer in layers:
            layer.measure(self.beta1, self.beta2, made)
        first, last = self._steps(total_steps)
        if step == last or (first <= step < last and step % self.interval == 0):
            self._choose(layers, self.budget(step, total_steps, len(layers)))
        elif step < last:
            return
        for layer in layers:
            layer.values.mul_(layer.kept)

    def budget(self, step: int, total_steps: int, layers: int) -> int:
        """How many triplets all layers together may keep after a step, rounded down as in the authors' code."""
        first, last = self._steps(total_steps)
        left = 0.0 if step >= last else 1 - max(0.0, (step - first) / (last - first))
        initial, final = layers * self.initial_rank, layers * self.rank
        return int((initial - final) * left**3 + final)

    def _steps(self, total_steps: int) -> tuple[int, int]:
        """After how many steps the budget begins to fall, and the choice is fixed: after one at the earliest, however
        short the training is, or nothing would ever be chosen.
        """
        return round(self.start * total_steps), max(1, round(self.end * total_steps))

    def fold(self, part: nn.Module) -> tuple[LoRA, nn.Module]:
        """LoRA of the triplets that act. Where layers cannot have ranks of their own, they get the largest of them."""
        return lora_of_ranks(self, _triplets_of(part))

    def _choose(self, layers: list[Triplets], number: int) -> None:
        """Keep the most important triplets of all layers together."""
        importance = torch.cat([layer.importance() for layer in layers])
        kept = torch.zeros_like(importance)
        kept.index_fill_(0, importance.argsort(descending=True, stable=True)[:number], 1)
        for layer, chosen in zip(layers, kept.split([len(layer.kept) for layer in layers]), strict=True):
            layer.kept.copy_(chosen)


def _triplets_of(part: nn.Module) -> dict[str, Triplets]:
    """By path, <tower>.<block>.<site>."""
    return {path: module for path, module in part.named_modules() if isinstance(module, Triplets)}


class OfRanks(Protocol):
    """A low-rank change of which not every rank acts."""

    target: str

    def acting(self) -> torch.Tensor:
        """Which ranks act: (rank,)."""

    def low_rank(self, rank: int) -> LowRank:
        """The same change with this rank and a scale of 1."""


def lora_of_ranks(method: Method, layers: Mapping[str, OfRanks]) -> tuple[LoRA, nn.Module]:
    """LoRA, and its modules, of the ranks that act in the layers of a method, by path <tower>.<block>.<site>."""
    towers = {path.partition(".")[0] for path in layers}
    # A rank can be given by block and target, but not by tower.
    key_of = {path: _rank_key(path, layer) if len(towers) == 1 else "all" for path, layer in layers.items()}
    ranks: dict[str, int] = {}
    for path, layer in layers.items():
        ranks[key_of[path]] = max(ranks.get(key_of[path], 1), int(layer.acting().sum()))
    lora = LoRA(
        rank=method.rank,
        targets=method.targets,
        dropout=method.dropout,
        overrides={key: rank for key, rank in ranks.items() if rank != method.rank},
        blocks=method.blocks,
        towers=method.towers,
    )
    return lora, tree_of({path: layer.low_rank(ranks[key_of[path]]) for path, layer in layers.items()})


def _rank_key(path: str, layer: OfRanks) -> str:
    """How the rank of a layer is named among LoRA's overrides."""
    # Outside the blocks there is no index but that of a stage, as in "downsample.1/reduction", and a key has none.
    _, second, *_ = path.split(".")
    return f"{second}/{layer.target}" if second.isdigit() else layer.target
