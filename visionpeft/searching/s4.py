"""The design space of S4: groups of blocks, each with a mix of methods of its own.

Chen, Zhang, Shi, Li, Smola, Yang, Parameter-Efficient Fine-Tuning Design Spaces, ICLR 2023,
https://arxiv.org/abs/2301.01821.
"""

import functools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from visionpeft.errors import ConfigurationError
from visionpeft.methods.adapter import Adapter
from visionpeft.methods.bitfit import BitFit
from visionpeft.methods.lora import LoRA
from visionpeft.methods.parts.base import Method
from visionpeft.methods.prefix_tuning import PrefixTuning
from visionpeft.searching.evolution import ATTEMPTS, Rounds
from visionpeft.searching.space import Host, Member, Space

# How many blocks the four groups have, in proportion.
PATTERNS = {
    "spindle": (1, 2, 2, 1),
    "uniform": (1, 1, 1, 1),
    "increasing": (1, 2, 3, 4),
    "decreasing": (4, 3, 2, 1),
    "bottleneck": (2, 1, 1, 2),
}
# A: adapter after the MLP, L: LoRA on q and v, P: prefix, B: biases.
PRESET = ("AL", "AP", "APB", "PBL")
MIXES = ("A", "L", "P", "B", "AL", "AP", "AB", "LP", "LB", "PB", "ALP", "ALB", "APB", "PBL", "ALPB")


def groups_of(pattern: str, depth: int) -> list[list[int]]:
    """The blocks of the four groups, in order; every group has one at least.

    Raises:
        ConfigurationError: there are fewer blocks than groups.
    """
    parts = PATTERNS[pattern]
    if depth < len(parts):
        raise ConfigurationError(
            f"space s4 has four groups of blocks, and this backbone has {depth} blocks, so that no member fits it"
        )
    ends = [round(depth * sum(parts[: group + 1]) / sum(parts)) for group in range(len(parts))]
    for group in range(len(parts)):  # at least one block each, and one left for each that follows
        least = (ends[group - 1] if group else 0) + 1
        ends[group] = min(max(ends[group], least), depth - (len(parts) - 1 - group))
    return [list(range(start, end)) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


@dataclass(frozen=True)
class S4Space(Space):
    """Four groups of blocks and a mix of methods in each, all blocks training about as many values.

    The first member is the paper's result: groups as a spindle (few, many, many, few), with adapter and LoRA; adapter
    and prefix; adapter, prefix and biases; prefix, biases and LoRA. The others are drawn from all patterns, mixes
    and numbers of values. Every member is trained by itself. The biases of a block have a number of values that is
    given; what is left of a block's values is shared evenly by the other methods of its mix, each with a size of 1 at
    least. Patterns and the result are recalled, not read: the authors' released code has no groups, and its
    configuration of this name is UniPELT. Biases are those of `BitFit` in these blocks.

    Args:
        values: numbers of trained values of a block, of which a member has one.
    """

    name: ClassVar[str] = "s4"

    values: tuple[int, ...] = (4000, 8000, 16000)

    def __post_init__(self):
        if not self.values or not all(isinstance(value, int) and value > 0 for value in self.values):
            raise ConfigurationError(f"values must be positive integers, not {list(self.values)}")

    def member(self, host: Host, values: int, pattern: str = "spindle", mixes: Sequence[str] = PRESET) -> Member:
        """The member of a pattern and four mixes, whose blocks train about so many values."""
        groups = groups_of(pattern, host.tower.depth)
        return {"pattern": pattern, "groups": groups, "sizes": [_sizes(host, mix, values) for mix in mixes]}

    def methods(self, member: Member) -> list[Method]:
        """`Adapter`, `LoRA`, `PrefixTuning` and `BitFit` of each group."""
        makers = {
            "A": lambda size, blocks: Adapter(size, blocks=blocks),
            "L": lambda size, blocks: LoRA(size, blocks=blocks),
            "P": lambda size, blocks: PrefixTuning(size, blocks=blocks),
            "B": lambda size, blocks: BitFit(blocks=blocks),
        }
        return [
            makers[kind](size, blocks)
            for blocks, sizes in zip(member["groups"], member["sizes"], strict=True)
            for kind, size in sizes.items()
        ]

    def smallest(self, host: Host) -> Member:
        """The smallest of each method that trains least."""
        return min(
            (self.member(host, min(self.values), mixes=(kind,) * 4) for kind in "ALPB"),
            key=lambda each: host.count(each),
        )

    def text(self, member: Member) -> str:
        """The groups and their methods with sizes."""
        parts = []
        for blocks, sizes in zip(member["groups"], member["sizes"], strict=True):
            methods = " ".join(kind if kind == "B" else f"{kind}{size}" for kind, size in sizes.items())
            parts.append(f"{blocks[0]}-{blocks[-1]}: {methods}" if len(blocks) > 1 else f"{blocks[0]}: {methods}")
        return f"{member['pattern']}, {'; '.join(parts)}"

    def rounds(self, host: Host, budget: int, seed: int) -> Rounds:
        """One round: the paper's result with each number of values, then members that are drawn."""
        chance, seen = random.Random(seed), set()
        members = [self.member(host, values) for values in self.values]
        for _ in range(ATTEMPTS * budget):
            if len(members) >= 2 * budget:
                break
            mixes = [chance.choice(MIXES) for _ in range(4)]
            members.append(self.member(host, chance.choice(self.values), chance.choice([*PATTERNS]), mixes))
        kept = []
        for member in [*members, self.smallest(host)]:  # one of them is allowed, as `Host.check` has seen
            key = json.dumps(member)
            if key not in seen and host.fits(member):
                seen.add(key)
                kept.append(member)
        yield kept[:budget]


def _sizes(host: Host, mix: str, values: int) -> dict[str, int]:
    """The size of each method of a mix in a block: biases first, then equal shares of what is left."""
    one = _values(host)
    left = values - (one["B", 1] if "B" in mix else 0)
    sized = [kind for kind in mix if kind != "B"]
    sizes = {"B": 1} if "B" in mix else {}
    for kind in sized:
        each = one[kind, 2] - one[kind, 1]
        sizes[kind] = 1 + max(0, round((left / len(sized) - one[kind, 1]) / each))
    return sizes


@functools.lru_cache(maxsize=1)  # one backbone after the other is asked for the same few numbers
def _values(host: Host) -> dict[tuple[str, int], int]:
    """Values of each kind of method in the first block, of sizes 1 and 2."""
    return {(kind, size): host.count({"groups": [[0]], "sizes": [{kind: size}]}) for kind in "ALPB" for size in (1, 2)}
