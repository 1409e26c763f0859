"""S3PET: Sparse Structure Search for Delta Tuning (Hu et al., 2022), https://arxiv.org/abs/2206.07382."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn as nn

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Tower
from visionpeft.methods.lora import LowRank
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Measure, Method, blocks_of, require
from visionpeft.methods.parts.bottleneck import Bottleneck
from visionpeft.methods.parts.seeded import raw_numbers
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.sites import Placement, Shared

ADAPTER = "adapter"
HALVINGS = 100  # of an interval in float64, which then has no number inside


class Structure(nn.Module):
    """Gates of n candidates, with probabilities p_i = sigmoid((a_i - z) / beta) whose cost is the budget.

    z solves sum_i p_i size_i = budget, and a gradient in a goes through it. In training a gate is
    sigmoid((logit p_i + logit u_i) / temperature) with u_i drawn for each step (binary concrete), otherwise p_i.

    Args:
        sizes: values that each candidate trains.
        budget: sum of the probabilities times the sizes, below that of the sizes.
        beta: how flat the probabilities are.
        temperature: how far gates are from 0 and 1.
    """

    def __init__(self, sizes: Sequence[int], budget: int, beta: float, temperature: float):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(len(sizes)))
        self.register_buffer("noise", torch.zeros(len(sizes)))
        self.sizes = tuple(sizes)
        self.budget, self.beta, self.temperature = budget, beta, temperature
        self._shift: tuple[bytes, float] | None = None

    def draw(self, seed: int, step: int) -> None:
        """Draw u for a step; what is kept is logit u."""
        bits = raw_numbers(len(self.sizes), seed, step) >> np.uint64(11)
        uniform = torch.from_numpy((bits.astype(np.float64) + 0.5) / 2**53)
        self.noise.copy_(uniform.logit())

    def logits(self) -> torch.Tensor:
        """(a - z) / beta (n,), whose gradient knows that the cost stays."""
        alpha = self.alpha.double()
        sizes = torch.tensor(self.sizes, dtype=torch.float64, device=alpha.device)
        with torch.no_grad():
            shift = self._solved()
            probabilities = ((alpha - shift) / self.beta).sigmoid()
            slopes = sizes * probabilities * (1 - probabilities)
            weights = slopes / slopes.sum()
        # d z / d a_i = size_i p_i' / sum_j size_j p_j': the sum is zero in value and has this gradient.
        shift = shift + (weights * (alpha - alpha.detach())).sum()
        return ((alpha - shift) / self.beta).to(self.alpha.dtype)

    def _solved(self) -> float:
        """z, solved anew where a has changed; every candidate asks for it in every pass."""
        alpha, sizes = self.alpha.detach().double().cpu().numpy(), np.array(self.sizes, dtype=np.float64)
        state = alpha.tobytes()
        if self._shift is None or self._shift[0] != state:
            low, high = alpha.min() - 50 * self.beta, alpha.max() + 50 * self.beta
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                if (sizes / (1 + np.exp((middle - alpha) / self.beta))).sum() > self.budget:
                    low = middle
                else:
                    high = middle
            self._shift = state, float(middle)
        return self._shift[1]

    def gates(self) -> torch.Tensor:
        """The gates (n,)."""
        logits = self.logits()
        return ((logits + self.noise) / self.temperature).sigmoid() if self.training else logits.sigmoid()


class StructuredLowRank(LowRank):
    """y + g up down x, initialised as `LowRank`."""

    output_side = ("up",)

    def __init__(self, layer: Layer, rank: int, structure: Structure, index: int):
        nn.Module.__init__(self)  # A and B are no parameters here
        self.down = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, layer.in_features), a=math.sqrt(5)))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))
        self.scaling, self.dropout = 1.0, nn.Dropout(0.0)
        self.index = index
        self._structure = (structure,)  # in a tuple, because the adapter owns it once for all candidates

    @property
    def A(self) -> torch.Tensor:
        """g down (rank, in)."""
        return self._structure[0].gates()[self.index] * self.down

    @property
    def B(self) -> torch.Tensor:
        """up (out, rank)."""
        return self.up


class StructuredAdapter(nn.Module):
    """x + g A(x)."""

    tokenwise = True
    stackable = True

    def __init__(self, bottleneck: Bottleneck, structure: Structure, index: int):
        super().__init__()
        self.bottleneck = bottleneck
        self.index = index
        self._structure = (structure,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        return x + (self._structure[0].gates()[self.index] * self.bottleneck(x)).to(x.dtype)


@dataclass(frozen=True)
class S3PET(Method):
    """Low-rank changes and adapters at the places that are worth their values, found by gates under a budget.

    Two stages (`visionpeft.stages`; the command line does both). In the first, every candidate, a low-rank change of
    each target in each block and an adapter after each MLP, has a gate (`Structure`): W + g B A, or m + g A(m). What
    they train is trained on a part of the training data, and the numbers a of the gates by `visionpeft.Selection` on
    the rest, the share `held_out`, as in second-order DARTS. Then the candidates of highest probability are kept, as
    long as they fit into the budget; they start anew and are trained on all data without gates. With `kept` it is that
    second stage alone.
    The authors' second optimiser has a learning rate of 0.1; that their candidates of low rank have rank 1 is
    recalled. Theirs also are biases and norms, which are not built. An adapter starts near identity, as `Adapter`.
    It is the method of a search and no listed one, for image towers. Mergeable if no adapter is kept.
    Trained in the end: at most `budget`; in the first stage all candidates and one number for each.
    Source: Hu et al., Sparse Structure Search for Delta Tuning, 2022, and the authors' code.

    Args:
        budget: values that are trained in the end, at most.
        rank: rank of a low-rank change.
        bottleneck: width of an adapter; 0 for no adapters.
        targets: layers of the low-rank changes, out of q k v proj fc1 fc2 gate.
        beta: how flat the probabilities are.
        temperature: how far gates are from 0 and 1 in the first stage.
        held_out: share of the training data on which the gates are learnt.
        selection_lr: learning rate of the gates.
        seed: seed of the draws.
        kept: candidates that are kept, such as ["0.q", "3.adapter"]; None in the first stage.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers; by default the image tower.
    """

    found: ClassVar[tuple[str, ...]] = ()

    budget: int = 100_000
    rank: int = 1
    bottleneck: int = 4
    targets: tuple[str, ...] = ("q", "k", "v", "proj", "fc1", "fc2")
    beta: float = 1.0
    temperature: float = 1.0
    held_out: float = 0.3
    selection_lr: float = 0.1
    seed: int = 0
    kept: list[str] | None = None
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("budget", "rank", "beta", "temperature", "selection_lr"):
            require(getattr(self, name) > 0, self, f"{name} must be positive, not {getattr(self, name)}")
        require(self.bottleneck >= 0 and self.seed >= 0, self, "bottleneck and seed must not be negative")
        require(0 < self.held_out < 1, self, f"held_out must be between 0 and 1, not {self.held_out}")
        require(self.kept is None or len(self.kept) > 0, self, "kept names no candidate")
        require_targets(self)

    @property
    def stages_after(self) -> int:
        """One, until candidates are kept."""
        return 1 if self.kept is None else 0

    def candidates(self, tower: Tower) -> dict[str, tuple[int | None, Layer | None, int]]:
        """By name: the block, the layer (None of an adapter), and how many values are trained there."""
        found = {
            f"{index}.{layer.target}": (index, layer, self.rank * (layer.in_features + layer.out_features))
            for index, layer in target_layers(self, tower)
        }
        if self.bottleneck:
            size = 2 * tower.width * self.bottleneck + self.bottleneck + tower.width
            found |= {f"{index}.{ADAPTER}": (index, None, size) for index in blocks_of(self, tower)}
        return found

    def place(self, tower: Tower) -> Iterator[Placement | Shared]:
        """Gated candidates and their gates; or those that are kept, without."""
        candidates = self.candidates(tower)
        if self.kept is None:
            sizes = [size for *_, size in candidates.values()]
            require(
                min(sizes) <= self.budget < sum(sizes),
                self,
                f"a budget of {self.budget:,} leaves nothing to choose among candidates of {min(sizes):,} to "
                f"{max(sizes):,} values and {sum(sizes):,} in all",
            )
            structure = Structure(sizes, self.budget, self.beta, self.temperature)
            structure.draw(self.seed, 0)
            yield Shared(tower.name, "structure", structure)
        else:
            unknown = [name for name in self.kept if name not in candidates]
            require(not unknown, self, f"there is no candidate {', '.join(unknown)} here, as kept says")
        for number, (name, (index, layer, _)) in enumerate(candidates.items()):
            if self.kept is not None and name not in self.kept:
                continue
            if layer is None:
                gated = self.kept is None
                bottleneck = Bottleneck(tower.width, self.bottleneck, "gelu", 1.0, 0.0, 0.0, "houlsby", not gated)
                module = StructuredAdapter(bottleneck, structure, number) if gated else bottleneck
                yield Placement(tower.name, index, "mlp_out", module)
            elif self.kept is None:
                yield Placement(tower.name, index, layer.site, StructuredLowRank(layer, self.rank, structure, number))
            else:
                change = LowRank(layer.in_features, layer.out_features, self.rank, 1.0, 0.0)
                yield Placement(tower.name, index, layer.site, change)

    def selects(self, part: nn.Module) -> list[nn.Parameter]:
        """In the first stage, what the gates come from."""
        return [structure.alpha for structure in _structures(part)]

    def after_step(self, part: nn.Module, step: int, total_steps: int) -> None:
        """Draw the gates of the next step."""
        for structure in _structures(part):
            structure.draw(self.seed, step)

    def next_stage(
        self,
        towers: Sequence[Tower],
        part: nn.Module,
        start: Mapping[str, torch.Tensor],
        trained: Mapping[str, torch.Tensor],
        measure: Measure,
    ) -> tuple[Method, dict[str, torch.Tensor]]:
        """Keep the candidates of highest probability that fit into the budget, one after the other."""
        (tower,), (structure,) = towers, _structures(part)
        alpha = structure.alpha.detach().tolist()
        require(all(map(math.isfinite, alpha)) and len(set(alpha)) > 1, self, "its gates say nothing")
        candidates, kept, left = list(self.candidates(tower).items()), [], self.budget
        for number in sorted(range(len(alpha)), key=lambda number: -alpha[number]):
            name, (*_, size) = candidates[number]
            if size <= left:
                kept.append(name)
                left -= size
        return dataclasses.replace(self, kept=sorted(kept, key=list(self.candidates(tower)).index)), {}


def _structures(part: nn.Module) -> list[Structure]:
    return [module for module in part.modules() if isinstance(module, Structure)]
