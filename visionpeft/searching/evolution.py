"""Evolutionary search: the best so far are crossed and changed, and their children are judged."""

import json
import random
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

Member = TypeVar("Member")
Rounds = Generator[list[Member], list[float], None]

POPULATION = 50
KEPT = 5  # one of so many is a parent
ATTEMPTS = 100


class Evolution(Generic[Member]):
    """Rounds of members of a space that are to be judged. What comes next follows from seed and scores alone.

    The first round is drawn; each further one is half children of two parents and half changed parents, the parents
    being the best fifth of a population among all that were judged. A member comes once. One that does not fit is drawn
    again, and made smaller if that goes on.

    Args:
        draw: a random member.
        cross: a child of two.
        change: a member changed at random.
        shrink: a member with something of it made smaller at random, if there is anything.
        fits: whether a member is allowed.
    """

    def __init__(
        self,
        draw: Callable[[random.Random], Member],
        cross: Callable[[random.Random, Member, Member], Member],
        change: Callable[[random.Random, Member], Member],
        shrink: Callable[[random.Random, Member], Member],
        fits: Callable[[Member], bool],
    ):
        self.draw, self.cross, self.change, self.shrink, self.fits = draw, cross, change, shrink, fits

    def rounds(self, budget: int, seed: int) -> Rounds:
        """Rounds of at most `budget` members in all; send the scores of each, higher being better.

        A population is 50 as in NOAH's scripts, or a quarter of a budget below 200. The rounds end early when nothing
        new is found.
        """
        chance, judged, seen = random.Random(seed), [], set()
        population = min(POPULATION, max(2, budget // 4))
        parents = max(2, population // KEPT)
        while len(judged) < budget:
            wanted = min(population, budget - len(judged))
            if not judged:
                makers = [lambda: self.draw(chance)] * wanted
            else:
                best = [member for member, _ in sorted(judged, key=lambda each: -each[1])[:parents]]

                def child(best: list[Member] = best) -> Member:
                    return self.cross(chance, chance.choice(best), chance.choice(best))

                def changed(best: list[Member] = best) -> Member:
                    return self.change(chance, chance.choice(best))

                makers = [child if place < wanted // 2 else changed for place in range(wanted)]
            members = [member for make in makers if (member := self._new(make, chance, seen)) is not None]
            if not members:
                return
            scores = yield members
            judged += zip(members, scores, strict=True)

    def _new(self, make: Callable[[], Member], chance: random.Random, seen: set[str]) -> Member | None:
        """A member that fits and has not come yet, or None if none is found."""
        for attempt in range(ATTEMPTS):
            member = make()
            if attempt >= ATTEMPTS // 2:  # hardly any fits
                for _ in range(ATTEMPTS):
                    if self.fits(member):
                        break
                    member = self.shrink(chance, member)
            key = json.dumps(member, sort_keys=True)
            if key not in seen and self.fits(member):
                seen.add(key)
                return member
        return None
