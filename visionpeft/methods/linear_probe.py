"""The linear probe: train the head alone."""

from dataclasses import dataclass
from typing import ClassVar

from visionpeft.methods.parts.base import Method


@dataclass(frozen=True)
class LinearProbe(Method):
    """Trains the head alone, on the frozen features of the backbone. Nothing is added."""

    needs_blocks: ClassVar = False
