"""What a pass over training batches can measure for a method that must see data; `adapters.measures` does it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn as nn

from visionpeft.methods.parts.sparse_delta import SparseCandidate

Batch = Sequence[torch.Tensor]
Loss = Callable[[nn.Module, Batch], torch.Tensor]


@dataclass(frozen=True)
class Place:
    """A site of a tower.

    Args:
        tower: name of the tower.
        block: index of the block, or None for a layer of the tower itself.
        site: a token site, or a layer site.
    """

    tower: str
    block: int | None
    site: str

    @property
    def path(self) -> str:
        """Where the tensors of a module at this place are in an adapter, after the name of the method."""
        return ".".join(str(part) for part in (self.tower, self.block, self.site) if part is not None)


class Squares(Protocol):
    """Measures sums of squared gradients.

    Attributes:
        head_values: trained values of the adapter's heads.
    """

    head_values: int

    def __call__(
        self,
        candidates: Mapping[str, SparseCandidate],
        samples: int | None,
        each: bool,
        clip: float | None = None,
        training: bool = False,
        hardest: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Sums by name; see `adapters.measures.Measures`."""


class Measures(Squares, Protocol):
    """Measures sums of gradients, what layers read, and sizes of channels, too."""

    def gradients(
        self,
        candidates: Mapping[str, SparseCandidate],
        samples: int | None,
        loss: Loss | None = None,
        training: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Sums over batches of gradients by name."""

    def features(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """What the head of the model reads (batch, width)."""

    def inputs(self, places: Sequence[Place], samples: int | None) -> dict[Place, torch.Tensor]:
        """Second moments of what layers read."""

    def sizes(self, places: Sequence[Place], samples: int | None) -> dict[Place, torch.Tensor]:
        """Sizes of channels in each class."""
