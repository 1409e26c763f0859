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
from visionpeft.sites.carrying import Carriers, Carrying, entering, leaving
from visionpeft.sites.layers import SitedLayer, SitedLinear, SitedPointwise, sited_layer_class
from visionpeft.sites.placement import NEXT_BLOCK, TOKEN_SITES, Order, Placement, Shared, is_drawn, order_of

__all__ = [
    "NEXT_BLOCK",
    "TOKEN_SITES",
    "UNSEEN",
    "UNTOUCHED",
    "Carriers",
    "Carrying",
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
    "entering",
    "is_drawn",
    "join",
    "leaving",
    "order_of",
    "sited_layer_class",
]
