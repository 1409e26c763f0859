"""Full fine-tuning: train everything."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.base import Method


@dataclass(frozen=True)
class FullFineTuning(Method):
    """Trains every parameter of the backbone; the frozen ones are kept and come back on detaching.

    Mergeable. Trainable: all parameters of the tower, but those of heads; 85,798,656 on ViT-B/16.

    Args:
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    towers: str | list[str] | None = None

    def trains(self, tower: Tower) -> Iterator[str]:
        """All parameters of the tower."""
        yield from tower.parameter_names()
