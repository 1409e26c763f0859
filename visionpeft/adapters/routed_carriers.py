"""What is carried from block to block on a batch whose rows go to several adapters: of each row, its adapter's."""

import torch

from visionpeft.adapters.route import Key
from visionpeft.adapters.routed_sites import RoutedSite, gathered, taken
from visionpeft.backbones.frames import Frames
from visionpeft.sites import entering, leaving
from visionpeft.sites.routing import Routing


class RoutedCarriers(RoutedSite):
    """The carriers of one block, which act on the rows of their adapters; other rows stay as they are.

    What is carried is one tuple for each group of adapters, of its rows alone: the groups are those of every block.

    Args:
        routing: says which route is open.
        key: stands for the carriers of the block.
        frames: for clips, how many rows make one sample.
        first: whether it is the first block of its tower.
        last: whether it is the last one.
    """

    def __init__(self, routing: Routing, key: Key, frames: Frames | None, *, first: bool, last: bool):
        super().__init__(routing, key, frames)
        self.first, self.last = first, last

    def enter(self, x: torch.Tensor, carried: tuple | None) -> list:
        """The states of the carriers of each group, from the tokens that enter and what came with them."""
        parts = list(self._parts(x, self._route()))
        carried = (None,) * len(parts) if carried is None else carried
        return [entering(acting, taken(x, rows), before) for (rows, acting), before in zip(parts, carried, strict=True)]

    def leave(self, x: torch.Tensor, states: list) -> tuple[torch.Tensor, tuple]:
        """The tokens that leave the block, and what the carriers of each group carry on."""
        results, carried = [], []
        for (rows, acting), own in zip(self._parts(x, self._route()), states, strict=True):
            tokens, after = leaving(acting, taken(x, rows), own)
            results.append((rows, tokens))
            carried.append(after)
        return gathered(x, results), tuple(carried)
