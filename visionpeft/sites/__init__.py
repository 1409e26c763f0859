"""Named places inside a block and a layer, and what acts there."""

from visionpeft.sites.blocks import (
    TOKEN_SITES,
    UNSEEN,
    UNTOUCHED,
    ClassTokenOnly,
    Flow,
    Located,
    OnPatches,
    Order,
    Placement,
    Shared,
    SitedLayer,
    SitedLinear,
    SitedPointwise,
    Sites,
    Unseen,
    Untouched,
    is_drawn,
    join,
    order_of,
    sited_layer_class,
)
