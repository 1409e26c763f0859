"""The space of NOAH: prompts, ranks and bottlenecks of every block, judged with the weights of one supernet.

Zhang, Zhou, Liu, Neural Prompt Search, 2022, https://arxiv.org/abs/2206.04673.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from visionpeft.methods.parts.base import Method
from visionpeft.searching.evolution import Evolution, Rounds
from visionpeft.searching.space import Host, Member, Space, per_block
from visionpeft.searching.supernet import KINDS, NOAH, stand_alone, use_member

NEW_DEPTH, NEW_SIZE = 0.4, 0.2
LETTERS = {"prompts": "VPT", "ranks": "LoRA", "bottlenecks": "Adapter"}


@dataclass(frozen=True)
class NoahSpace(Space):
    """Numbers of prompts, ranks of LoRA and widths of an adapter, for each block.

    A member gives each kind a number of first blocks in which it acts, and in each of these a size. The supernet
    (`NOAH`) is trained once; members are judged on validation with its first prompts, ranks and channels; the best is
    trained again from the start. Crossing takes each kind whole from one of two parents, as the authors' code does.
    Changing draws a kind's depth anew with probability 0.4 and each size with 0.2, as the paper says; the code
    changes the depth alone. The paper's limit is 640,000 values on ViT-B/16, with 15 rounds of 50 members.

    Args:
        sizes: what prompts, ranks and bottlenecks may be, apart from 0.
        depths: in how many of the first blocks a kind may act; None for quarters of their number.
        targets: layers of the low-rank changes, out of q k v proj fc1 fc2 gate.
    """

    name: ClassVar[str] = "noah"

    sizes: tuple[int, ...] = (1, 5, 10)
    depths: tuple[int, ...] | None = None
    targets: tuple[str, ...] = ("q", "v")

    def __post_init__(self):
        self.supernet(0)  # which refuses values that make no sense

    def supernet(self, seed: int) -> NOAH:
        """The supernet of the largest member."""
        return NOAH(sizes=self.sizes, depths=self.depths, targets=self.targets, seed=seed)

    def use(self, part: nn.Module, member: Member) -> None:
        """Let a member act in the supernet."""
        use_member(part, member)

    def methods(self, member: Member) -> list[Method]:
        """`VPT`, `LoRA` and `Adapter`, as far as it has them."""
        return stand_alone(member, self.supernet(0))

    def smallest(self, host: Host) -> Member:
        """The smallest size in as few blocks as there may be."""
        depth = host.tower.depth
        least = min(self.supernet(0).depths_in(depth), default=0)
        return {kind: [min(self.sizes) if block < least else 0 for block in range(depth)] for kind in KINDS}

    def text(self, member: Member) -> str:
        """The sizes of each kind."""
        return ", ".join(f"{LETTERS[kind]} {per_block(member[kind])}" for kind in KINDS)

    def rounds(self, host: Host, budget: int, seed: int) -> Rounds:
        """The evolution."""
        number = host.tower.depth
        depths, sizes = self.supernet(0).depths_in(number), sorted(self.sizes)

        def of_depth(chance: random.Random, depth: int, before: list[int]) -> list[int]:
            """The sizes of a kind in its first blocks, drawn where it has not been."""
            return [(size or chance.choice(sizes)) if block < depth else 0 for block, size in enumerate(before)]

        def draw(chance: random.Random) -> Member:
            return {kind: of_depth(chance, chance.choice(depths), [0] * number) for kind in KINDS}

        def cross(chance: random.Random, one: Member, other: Member) -> Member:
            return {kind: list(chance.choice((one, other))[kind]) for kind in KINDS}

        def change(chance: random.Random, member: Member) -> Member:
            found = {}
            for kind in KINDS:
                depth = sum(size > 0 for size in member[kind])
                depth = chance.choice(depths) if chance.random() < NEW_DEPTH else depth
                own = of_depth(chance, depth, member[kind])
                found[kind] = [chance.choice(sizes) if size and chance.random() < NEW_SIZE else size for size in own]
            return found

        def shrink(chance: random.Random, member: Member) -> Member:
            kind = chance.choice(KINDS)
            depth = sum(size > 0 for size in member[kind])
            depth = chance.choice([each for each in depths if each <= depth])
            own = [chance.choice([each for each in sizes if each <= size]) if size else 0 for size in member[kind]]
            return member | {kind: of_depth(chance, depth, own)}

        return Evolution(draw, cross, change, shrink, host.fits).rounds(budget, seed)
