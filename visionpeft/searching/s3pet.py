"""The space of S3PET: structures that gates find, each under a budget of its own.

Hu et al., Sparse Structure Search for Delta Tuning, 2022, https://arxiv.org/abs/2206.07382.
"""

from dataclasses import dataclass
from typing import ClassVar

from visionpeft.errors import ConfigurationError
from visionpeft.methods.parts.base import Method
from visionpeft.searching.evolution import Rounds
from visionpeft.searching.space import Host, Member, Space
from visionpeft.searching.structure import S3PET


@dataclass(frozen=True)
class S3PetSpace(Space):
    """Structures under budgets that are shares of the limit.

    A trial is a training of `S3PET` in its two stages, with a budget of its own; the member that it gives is the
    structure that its gates have found, which the last trainings train from the start. There are as many members
    as shares. The budget of a search without a limit is half of what all candidates train.

    Args:
        shares: of the limit, one trial each, in order.
        rank: rank of a low-rank change.
        bottleneck: width of an adapter; 0 for no adapters.
        targets: layers of the low-rank changes.
    """

    name: ClassVar[str] = "s3pet"
    finds: ClassVar[bool] = True

    shares: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)
    rank: int = 1
    bottleneck: int = 4
    targets: tuple[str, ...] = ("q", "k", "v", "proj", "fc1", "fc2")

    def __post_init__(self):
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ConfigurationError(f"shares must be from 0 to 1 and not 0, not {list(self.shares)}")
        self._method(budget=1)  # which refuses values that make no sense

    def _method(self, **options) -> S3PET:
        return S3PET(rank=self.rank, bottleneck=self.bottleneck, targets=self.targets, **options)

    def methods(self, member: Member) -> list[Method]:
        """`S3PET` with what was kept, or, before that, in both stages."""
        return [self._method(budget=member["budget"], kept=member.get("kept"))]

    def found(self, member: Member, methods: list[dict]) -> Member:
        """The member with what the gates have kept."""
        return member | {"kept": methods[0]["fields"]["kept"]}

    def _sizes(self, host: Host) -> dict[str, int]:
        return {name: size for name, (*_, size) in self._method(budget=1).candidates(host.tower).items()}

    def smallest(self, host: Host) -> Member:
        """The smallest candidate alone."""
        sizes = self._sizes(host)
        name = min(sizes, key=sizes.get)
        return {"budget": sizes[name], "kept": [name]}

    def text(self, member: Member) -> str:
        """The budget, and what was kept."""
        return f"budget {member['budget']:,}" + (f": {' '.join(member['kept'])}" if "kept" in member else "")

    def rounds(self, host: Host, budget: int, seed: int) -> Rounds:
        """One round of all budgets that leave something to choose."""
        sizes = self._sizes(host).values()
        limit = min(host.limit or sum(sizes) // 2, sum(sizes) - 1)
        budgets = dict.fromkeys(max(min(sizes), round(share * limit)) for share in self.shares)
        yield [{"budget": each} for each in budgets][:budget]
