"""The supernet of NOAH: one training of prompts, low-rank changes and adapters of all sizes at once.

Zhang, Zhou, Liu, Neural Prompt Search, 2022, https://arxiv.org/abs/2206.04673.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft import methods as listed
from visionpeft.backbones.tower import Tower
from visionpeft.errors import UnsupportedError
from visionpeft.methods.adapter import Adapter
from visionpeft.methods.lora import LoRA, LowRank
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require, require_patches, to_parameter_dtype
from visionpeft.methods.parts.bottleneck import Bottleneck
from visionpeft.methods.parts.prompts import EnteringTokens, RemovePrompts, uniform_prompts
from visionpeft.methods.parts.seeded import raw_numbers
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.methods.vpt import VPT
from visionpeft.sites import Placement

KINDS = ("prompts", "ranks", "bottlenecks")
# For each kind its size in every block of the tower, 0 where it does not act.
Sizes = Mapping[str, Sequence[int]]


class Sliced(nn.Module):
    """A module of which only the first entries act: `drawn` of them in a training step, `kept` otherwise.

    `drawn` is a buffer, so that a resumed training goes on with what was drawn for its next step.
    """

    def of_sizes(self, largest: int) -> None:
        """Begin with all entries."""
        self.register_buffer("drawn", torch.tensor(largest))
        self._drawn = self.kept = largest

    @property
    def size(self) -> int:
        """How many entries act now."""
        return self._drawn if self.training else self.kept

    def draw(self, size: int) -> None:
        """Train the first `size` entries in the next step."""
        self._drawn = size  # a number of its own, as to read the buffer would wait for the device
        self.drawn.fill_(size)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._drawn = int(self.drawn)


class SlicedPrompts(Sliced, EnteringTokens):
    """The first prompts of P (largest, width), as they start in `VPT`."""

    def __init__(self, prompts: torch.Tensor, at: int):
        super().__init__(0, at, spanning=False)
        self.prompts = nn.Parameter(prompts)
        self.of_sizes(len(prompts))

    @property
    def num_tokens(self) -> int:
        """How many prompts act now."""
        return self.size if hasattr(self, "kept") else 0

    @num_tokens.setter
    def num_tokens(self, number: int) -> None:
        pass  # the base sets what changes here from step to step

    def prompts_for(self, x: torch.Tensor) -> torch.Tensor:
        """The prompts (1, size, width) that act now, in the precision of x."""
        return self.prompts[None, : self.size].to(x.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Refuse to enter the stream, where blocks are told of a number of prompts that stays.

        Raises:
            UnsupportedError: always; prompts that are keys and values alone come by `prompts_for`.
        """
        raise UnsupportedError(
            "the prompts of NOAH's supernet are keys and values alone, which another method in their block prevents; "
            "train the supernet by itself"
        )


class SlicedRemoval(RemovePrompts):
    """Removes as many tokens as `SlicedPrompts` has put in."""

    def __init__(self, prompts: SlicedPrompts):
        nn.Module.__init__(self)
        self.at, self.order = prompts.at, RemovePrompts(0, prompts.at, spanning=False).order
        self._prompts = (prompts,)  # in a tuple, because it has a place of its own

    @property
    def num_tokens(self) -> int:
        """How many prompts act now."""
        return self._prompts[0].num_tokens


class SlicedLowRank(Sliced, LowRank):
    """y + up[:, :r] down[:r] x: the first r ranks of `LowRank`, with a scale of 1 at every rank."""

    output_side = ("up",)

    def __init__(self, in_features: int, out_features: int, rank: int):
        nn.Module.__init__(self)  # A and B are no parameters here
        self.down = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5)))
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        self.scaling, self.dropout = 1.0, nn.Dropout(0.0)
        self.of_sizes(rank)

    @property
    def A(self) -> torch.Tensor:
        """down (r, in)."""
        return self.down[: self.size]

    @property
    def B(self) -> torch.Tensor:
        """up (out, r)."""
        return self.up[:, : self.size]


class SlicedBottleneck(Sliced, Bottleneck):
    """x + up[:, :h] gelu(down[:h] x + b[:h]) + c: the first h channels of a serial `Bottleneck`, or x with none."""

    def __init__(self, width: int, bottleneck: int):
        super().__init__(width, bottleneck, "gelu", 1.0, 0.0, 0.0, "houlsby", serial=True)
        self.of_sizes(bottleneck)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        size, down, up = self.size, self.down, self.up
        if size == 0:
            return x
        h = self.act(F.linear(to_parameter_dtype(x, down.weight), down.weight[:size], down.bias[:size]))
        return x + F.linear(h, up.weight[:, :size], up.bias).to(x.dtype)

    def row_values(self) -> dict[str, torch.Tensor | float]:
        """Weights and biases of the channels that act."""
        size, values = self.size, super().row_values()
        ends = {"down": values["down"][:size], "down_bias": values["down_bias"][:size], "up": values["up"][:, :size]}
        return values | ends | {"up_bias": values["up_bias"] * (size > 0)}


@dataclass(frozen=True)
class NOAH(Method):
    """Prompts, low-rank changes and serial adapters in every block, trained at all sizes at once.

    Every step draws a member of the space, the same in all processes: for each kind uniformly in how many of the first
    blocks it acts (`depths`), and for each of these its size (`sizes`). It acts with the first prompts, ranks and
    channels of the largest, so that all sizes share their weights. In block l with p prompts, rank r and bottleneck h:
    [P[:p]; x] enter it and leave after it, W + B[:, :r] A[:r] on `targets`, and m + up[:, :h] gelu(down[:h] m) on the
    output of the MLP. Outside of training the member `used` acts, or the largest.
    P starts as in `VPT`, A Kaiming-uniform, B zero, adapters near identity, as `VPT`, `LoRA` and `Adapter` do; the
    authors' start is Xavier's, and their LoRA has one A for q, k and v. There is no dropout, where they have 0.1.
    It is the method of a search and no listed one, for image towers and to be attached alone. Not mergeable.
    Trainable on L blocks of width D with a largest size s: L (s D + s * sum of (in + out) of the targets
    + 2 s D + s + D).
    Source: Zhang et al., Neural Prompt Search, 2022, and the authors' code; how a step draws is read from the code.

    Args:
        sizes: what prompts, ranks and bottlenecks may be, apart from 0.
        depths: in how many of the first chosen blocks a kind may act; None for quarters of their number.
        used: the member that acts outside of training, as `Sizes`; None for the largest.
        targets: layers of the low-rank changes, out of q k v proj fc1 fc2 gate.
        seed: seed of the draws.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers; by default the image tower.
    """

    sizes: tuple[int, ...] = (1, 5, 10)
    depths: tuple[int, ...] | None = None
    used: dict[str, list[int]] | None = field(default=None)
    targets: tuple[str, ...] = ("q", "v")
    seed: int = 0
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("sizes", "depths"):
            values = getattr(self, name)
            right = values is None or (len(values) > 0 and min(values) > 0 and len(set(values)) == len(values))
            require(right, self, f"{name} must be different positive integers, not {values}")
        require(self.used is None or set(self.used) == set(KINDS), self, f"used must give {', '.join(KINDS)}")
        require(self.seed >= 0, self, "seed must be an integer that is not negative")
        require_targets(self)

    def depths_in(self, number: int) -> tuple[int, ...]:
        """In how many of so many blocks a kind may act, ascending."""
        if self.depths is None:
            return tuple(sorted({max(1, round(number * quarter / 4)) for quarter in (1, 2, 3, 4)}))
        return tuple(sorted(depth for depth in self.depths if depth <= number))

    def drawn(self, step: int, number: int) -> dict[str, list[int]]:
        """The member of a step, its sizes in the chosen blocks, so many of them."""
        depths = self.depths_in(number)
        numbers = iter(raw_numbers(len(KINDS) * (number + 1), self.seed, step))
        member = {}
        for kind in KINDS:
            depth = depths[int(next(numbers)) % len(depths)]
            sizes = [self.sizes[int(next(numbers)) % len(self.sizes)] for _ in range(number)]
            member[kind] = [size if place < depth else 0 for place, size in enumerate(sizes)]
        return member

    def place(self, tower: Tower) -> Iterator[Placement]:
        """Sliced prompts, low-rank changes and a bottleneck in every chosen block."""
        require_patches(self, tower)
        blocks, largest = blocks_of(self, tower), max(self.sizes)
        require(
            len(self.depths_in(len(blocks))) > 0,
            self,
            f"depths are {', '.join(map(str, self.depths or ()))}, but the {tower.name} tower has {len(blocks)} blocks "
            "of them, so that the space has no member here",
        )
        modules: dict[str, list[list[Sliced]]] = {kind: [[] for _ in blocks] for kind in KINDS}
        for place, index in enumerate(blocks):
            prompts = SlicedPrompts(uniform_prompts(tower, largest), tower.num_prefix_tokens)
            modules["prompts"][place].append(prompts)
            yield Placement(tower.name, index, "stream_in", prompts)
            yield Placement(tower.name, index, "stream_out", SlicedRemoval(prompts))
        for index, layer in target_layers(self, tower):
            low_rank = SlicedLowRank(layer.in_features, layer.out_features, largest)
            modules["ranks"][blocks.index(index)].append(low_rank)
            yield Placement(tower.name, index, layer.site, low_rank)
        for place, index in enumerate(blocks):
            bottleneck = SlicedBottleneck(tower.width, largest)
            modules["bottlenecks"][place].append(bottleneck)
            yield Placement(tower.name, index, "mlp_out", bottleneck)
        member, used = self.drawn(0, len(blocks)), self.used
        for kind, of_blocks in modules.items():
            for place, (index, own) in enumerate(zip(blocks, of_blocks, strict=True)):
                for module in own:
                    module.draw(member[kind][place])
                    if used is not None:
                        module.kept = used[kind][index]

    def after_step(self, part: nn.Module, step: int, total_steps: int) -> None:
        """Draw the member of the next step."""
        for blocks in part.values():
            of_blocks = _sliced(blocks)
            member = self.drawn(step, len(of_blocks))
            for place, modules in enumerate(of_blocks.values()):
                for kind, module in modules:
                    module.draw(member[kind][place])


def _sliced(blocks: nn.ModuleDict) -> dict[int, list[tuple[str, Sliced]]]:
    """Kinds and modules by block, of one tower of an adapter's part."""
    kinds = {SlicedPrompts: "prompts", SlicedLowRank: "ranks", SlicedBottleneck: "bottlenecks"}
    return {
        int(index): [(kinds[type(module)], module) for module in block.modules() if type(module) in kinds]
        for index, block in sorted(blocks.items(), key=lambda item: int(item[0]))
    }


def use_member(part: nn.Module, sizes: Sizes) -> None:
    """Let a member of the space act outside of training.

    Args:
        part: the supernet's modules in an adapter.
        sizes: of the member.
    """
    for blocks in part.values():
        for index, modules in _sliced(blocks).items():
            for kind, module in modules:
                module.kept = sizes[kind][index]


def stand_alone(sizes: Sizes, supernet: NOAH) -> list[Method]:
    """The methods that a member of the space is by itself: `VPT`, `LoRA` and `Adapter`, as far as it has them.

    Args:
        sizes: of the member.
        supernet: with the targets of the low-rank changes.
    """
    found = []
    for kind, make in (("prompts", VPT), ("ranks", LoRA), ("bottlenecks", Adapter)):
        acting = {index: size for index, size in enumerate(sizes[kind]) if size}
        if not acting:
            continue
        largest = max(acting.values())
        own = {"targets": supernet.targets} if make is LoRA else {}
        others = {str(index): size for index, size in acting.items() if size != largest}
        found.append(make(largest, overrides=others, blocks=list(acting), towers=supernet.towers, **own))
    return found


def described(methods: Sequence[Method]) -> list[dict]:
    """Methods as a configuration names them, with all fields: what is left out would be taken over from another."""
    return [{"class_path": _class_path(type(method)), "init_args": asdict(method)} for method in methods]


def _class_path(cls: type[Method]) -> str:
    """Its name, or its import path if it is in no list."""
    return cls.__name__ if cls.__name__ in listed.__all__ else f"{cls.__module__}.{cls.__qualname__}"
