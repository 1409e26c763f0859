"""What cannot act in a tower in which values are carried from block to block beside the tokens."""

from collections.abc import Mapping

import torch.nn as nn

from visionpeft.errors import UnsupportedError
from visionpeft.sites import NEXT_BLOCK, Order, order_of

CARRYING = "values are carried from block to block beside the tokens"
CARRIERS = ("stream_in", NEXT_BLOCK)  # where carriers are placed


def check_carried(tower: str, plan: Mapping[tuple[str, int | None, str, str | None], list[nn.Module]]) -> None:
    """Refuse prompts that stay for several blocks where something is carried beside the tokens of each block.

    Args:
        tower: name of the tower.
        plan: what acts where, by tower, block, site and where it is added.

    Raises:
        UnsupportedError: if both are there.
    """
    own = [(key, modules) for key, modules in plan.items() if key[0] == tower]
    carried = any((site, add) == CARRIERS for (_, _, site, add), _ in own)
    if carried and any(order_of(module) == Order.ENTER_SPAN for _, modules in own for module in modules):
        raise UnsupportedError(
            "shallow prompts would be among the tokens beside which another adapter carries values from block to "
            "block; use VPT(deep=True)"
        )
