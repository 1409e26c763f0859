"""What is placed at a site, and the law of order among what acts at one."""

from dataclasses import dataclass
from enum import IntEnum

import torch.nn as nn
from timm.layers import DropPath, PatchDropout
from torch.nn.modules.dropout import _DropoutNd

TOKEN_SITES = ("stream_in", "attn_in", "attn_out", "stream_mid", "mlp_in", "mlp_out", "stream_out")

# where a branch is added whose module is a carrier (`carrying`)
NEXT_BLOCK = "next_block"
# and one that asks at `kv` (`asking`), of which the head reads what it got
HEAD = "head"


class Order(IntEnum):
    """Law of order among the modules of one site: it, and not the order of attaching, decides who acts first."""

    REPLACE = 0  # what overwrites tokens of the backbone by their position
    ENTER_SPAN = 1  # prompts that stay for several blocks
    ENTER = 2  # prompts of this block alone
    RENEW = 3  # what makes the weight of a layer anew from that of the backbone; only one at a layer can be merged
    WEIGHT = 4  # what changes the weight or bias of a layer
    OUTPUT = 5  # what rescales or shifts the output of a layer
    TOKENS = 6  # everything else
    LEAVE = 7
    LEAVE_SPAN = 8
    READ = 9  # what makes of the tokens after the last block those that are read


def order_of(module: nn.Module) -> Order:
    """The place of a module in the law of order."""
    return getattr(module, "order", Order.TOKENS)


def is_drawn(module: nn.Module) -> bool:
    """Whether a module is a dropout at work: `nn.Dropout` for each value, any other for whole channels, tokens or
    samples.
    """
    names = {DropPath: "drop_prob", PatchDropout: "prob", _DropoutNd: "p"}
    rates = [getattr(module, name) for kind, name in names.items() if isinstance(module, kind)]
    return module.training and any(rate is not None and rate > 0 for rate in rates)


@dataclass(frozen=True)
class Placement:
    """One module of an adapter at one site.

    Args:
        tower: name of the tower, "visual" or "text".
        block: index of the block, or None for a layer of the tower itself (patch embedding, final norm).
        site: a token site, a layer site such as "q", or "kv".
        module: what acts there; owned by the adapter.
        add: for a branch, the later token site of the same block at which the module's output is added; `NEXT_BLOCK`
            for a carrier, `HEAD` for tokens that ask.
        name: name of the module in the adapter, for a second one of a method at one site; by default that of the site.
    """

    tower: str
    block: int | None
    site: str
    module: nn.Module
    add: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Shared:
    """A module that several placements of one tower use; the adapter owns it under this name."""

    tower: str
    name: str
    module: nn.Module
