"""Named places inside a block and a layer, and what acts there."""

from visionpeft.sites.blocks import (
    UNSEEN,
    UNTOUCHED,
    ClassTokenOnly,
    Flow,
    Located,
    OnPatches,
    Sites,
    Unseen,
    Untouched,
    act_on_kv,
    join,
)
from visionpeft.sites.layers import SitedLayer, SitedLinear, SitedPointwise, sited_layer_class
from visionpeft.sites.placement import TOKEN_SITES, Order, Placement, Shared, is_drawn, order_of

__all__ = [
    "TOKEN_SITES",
    "UNSEEN",
    "UNTOUCHED",
    "ClassTokenOnly",
    "Flow",
    "Located",
    "OnPatches",
    "Order",
    "Placement",
    "Shared",
    "SitedLayer",
    "SitedLinear",
    "SitedPointwise",
    "Sites",
    "Unseen",
    "Untouched",
    "act_on_kv",
    "is_drawn",
    "join",
    "order_of",
    "sited_layer_class",
]
