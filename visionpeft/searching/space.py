"""What a space is: members, the order in which they are judged, and the methods that a member is."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from visionpeft.backbones.tower import Tower
from visionpeft.backbones.whole_model import describe
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.methods.parts.base import Method
from visionpeft.searching.evolution import Rounds

Member = dict  # plain values, as JSON has them


class Space(ABC):
    """A space of compositions of methods. Its fields are what `--space_options` sets.

    Attributes:
        name: on the command line.
        finds: whether a trial finds the member that it judges.
    """

    name: ClassVar[str]
    finds: ClassVar[bool] = False

    @abstractmethod
    def smallest(self, host: "Host") -> Member:
        """The member that trains least."""

    @abstractmethod
    def rounds(self, host: "Host", budget: int, seed: int) -> Rounds:
        """Rounds of members to be judged, at most `budget` in all; it is sent the scores of each round."""

    @abstractmethod
    def methods(self, member: Member) -> list[Method]:
        """The methods that a member is by itself."""

    @abstractmethod
    def text(self, member: Member) -> str:
        """A member in a few words."""

    def supernet(self, seed: int) -> Method | None:
        """The method that is trained once in the place of every member, if there is one."""
        return None

    def found(self, member: Member, methods: list[dict]) -> Member:
        """The member that a trial has found, if it `finds`.

        Args:
            member: what the trial began with.
            methods: what was trained last, as `describe_method` describes it.
        """
        return member

    def use(self, part: nn.Module, member: Member) -> None:
        """Let a member act in the supernet, whose modules in an adapter `part` is."""
        raise TypeError(f"the members of {self.name} are trained themselves")


@dataclass(frozen=True)
class Host:
    """A backbone on which members act.

    Args:
        space: the space.
        model: the backbone with a head, to which nothing is attached.
        limit: most values that a member may train outside the head; None for any number.
    """

    space: Space
    model: nn.Module
    limit: int | None = None

    @functools.cached_property
    def tower(self) -> Tower:
        """The image tower.

        Raises:
            UnsupportedError: its blocks have no sites.
        """
        backbone = describe(self.model)
        if not backbone.towers:
            reasons = "; ".join(backbone.refused.values()) or "it has no blocks in which they act"
            raise UnsupportedError(f"space {self.space.name} has no member that fits {backbone.name}: {reasons}")
        return next(iter(backbone.towers.values()))

    def count(self, member: Member) -> int:
        """Values that a member trains outside the head, of the modules that its methods place."""
        trained = {}
        for method in self.space.methods(member):
            for placed in method.place(self.tower):
                trained |= {id(parameter): parameter for parameter in placed.module.parameters()}
            for name in method.trains(self.tower):
                parameter = self.tower.module.get_parameter(name)
                trained[id(parameter)] = parameter
        return sum(parameter.numel() for parameter in trained.values())

    def fits(self, member: Member) -> bool:
        """Whether it trains no more than the limit."""
        return self.limit is None or self.count(member) <= self.limit

    def check(self) -> None:
        """Refuse a space of which no member is allowed here.

        Raises:
            ConfigurationError: so it is.
        """
        least = self.count(self.space.smallest(self))
        if self.limit is not None and least > self.limit:
            raise ConfigurationError(
                f"space {self.space.name} has no member with at most {self.limit:,} values on this backbone: the "
                f"smallest has {least:,}; give a higher --max_parameters, or a space of smaller sizes (--space_options)"
            )


def per_block(sizes: Sequence[int]) -> str:
    """Sizes in words: "5" where all are alike, else "1 5 10 0"."""
    return str(sizes[0]) if len(set(sizes)) == 1 else " ".join(map(str, sizes))
