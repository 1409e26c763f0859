"""Partial fine-tuning: train the last blocks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.base import Method, require


@dataclass(frozen=True)
class LastBlocks(Method):
    """Trains the last n blocks and the final norm, the baseline "Partial-n" of the prompt tuning papers.

    Trainable on a ViT of width D with MLP width 4 D: n (12 D^2 + 13 D) + 2 D.
    Source: Lee et al., What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning, 2019.

    Args:
        n: number of blocks counted from the last.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    n: int = 1
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.n > 0, self, f"n must be a positive integer, not {self.n!r}")

    def trains(self, tower: Tower) -> Iterator[str]:
        """Parameters of the last blocks and of the final norms."""
        require(self.n <= tower.depth, self, f"n={self.n}, but the tower has {tower.depth} blocks")
        modules = [block.module for block in tower.blocks[-self.n :]]
        modules += [tower.layers[norm].owner for norm in tower.final_norms if norm in tower.layers]
        wanted = {id(parameter) for module in modules for parameter in module.parameters()}
        for name in tower.parameter_names():
            if id(tower.module.get_parameter(name)) in wanted:
                yield name
