"""Named places inside a block and a layer, and what acts there."""

from visionpeft.sites.asking import Asker, asker_of
from visionpeft.sites.blocks import (
    UNSEEN,
    UNTOUCHED,
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
from visionpeft.sites.class_token import ClassTokenOnly
from visionpeft.sites.layers import SitedLayer, SitedLinear, SitedPointwise, give_class, sited_layer_class
from visionpeft.sites.maps import MapFlow, OnPixels
from visionpeft.sites.placement import HEAD, NEXT_BLOCK, TOKEN_SITES, Order, Placement, Shared, is_drawn, order_of

__all__ = [
    "HEAD",
    "NEXT_BLOCK",
    "TOKEN_SITES",
    "UNSEEN",
    "UNTOUCHED",
    "Asker",
    "Carriers",
    "Carrying",
    "ClassTokenOnly",
    "Flow",
    "Located",
    "MapFlow",
    "OnPatches",
    "OnPixels",
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
    "asker_of",
    "entering",
    "give_class",
    "is_drawn",
    "join",
    "leaving",
    "order_of",
    "sited_layer_class",
]
