"""What is carried from block to block beside the tokens.

A side network reads the tokens of every block and keeps a state of its own from one block to the next. A block of a
tower with such a network hands on `Carrying(tokens, carried)` in the place of its tokens, which the library passes from
block to block as it passes tokens; the last block hands on tokens alone. Nothing is kept on a module, so that threads,
gradient checkpointing, compilation and sharding see a function of its input. The tokens stay a tensor of their own:
where nothing before them is trained, they have no gradient, and the backbone keeps nothing for a backward pass.

A carrier is placed at `stream_in` with `add=NEXT_BLOCK`, in every block of its tower, and computes

* `carrier(x, before) -> state`: from the tokens x (batch, tokens, width) that enter the block, before anything else
  acts on them, and from what it has carried out of the block before, None in the first block;
* `carrier.leave(x, state) -> x, after`: from the tokens that leave the block, after everything else has acted on them;
  `after` is what it carries on, any tensor, or None from the last block.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import nn

from visionpeft.errors import UnsupportedError


class Carrying(NamedTuple):
    """What a block hands on: tokens (batch, tokens, width), and for each carrier what it carries."""

    tokens: torch.Tensor
    carried: tuple


class CarriersOfBlock(Protocol):
    """The carriers of one block.

    Attributes:
        first: whether it is the first block of its tower.
        last: whether it is the last one.
    """

    first: bool
    last: bool

    def enter(self, x: torch.Tensor, carried: tuple | None) -> list:
        """The state of each carrier, from the tokens that enter and what came with them."""

    def leave(self, x: torch.Tensor, states: list) -> tuple[torch.Tensor, tuple]:
        """The tokens that leave the block, and what each carrier carries on."""


class Carriers:
    """The carriers of one block, which act on all samples.

    Args:
        modules: the carriers in the order in which they act.
        first: whether it is the first block of its tower.
        last: whether it is the last one.
    """

    def __init__(self, modules: Sequence[nn.Module], first: bool, last: bool):
        self.modules = tuple(modules)
        self.first, self.last = first, last

    def enter(self, x: torch.Tensor, carried: tuple | None) -> list:
        """The state of each carrier, from the tokens that enter and what came with them."""
        return entering(self.modules, x, carried)

    def leave(self, x: torch.Tensor, states: list) -> tuple[torch.Tensor, tuple]:
        """The tokens that leave the block, and what each carrier carries on."""
        return leaving(self.modules, x, states)


def entering(modules: Sequence[nn.Module], x: torch.Tensor, carried: tuple | None) -> list:
    """The state of each carrier from the tokens x and what each has carried."""
    carried = (None,) * len(modules) if carried is None else carried
    return [module(x, before) for module, before in zip(modules, carried, strict=True)]


def leaving(modules: Sequence[nn.Module], x: torch.Tensor, states: list) -> tuple[torch.Tensor, tuple]:
    """The tokens after all carriers, and what each carries on."""
    carried = []
    for module, state in zip(modules, states, strict=True):
        x, after = module.leave(x, state)
        carried.append(after)
    return x, tuple(carried)


def unpacked(x: torch.Tensor | Carrying, first: bool) -> tuple[torch.Tensor, tuple | None]:
    """The tokens that a block is given, and what is carried beside them.

    Raises:
        UnsupportedError: tokens alone, in a block that is not the first one.
    """
    if isinstance(x, Carrying):
        return x.tokens, x.carried
    if not first:
        raise UnsupportedError(
            "values are carried from block to block beside the tokens, so that a later block cannot be called with "
            "tokens alone; call the whole model, or switch the adapter off with use(model, None)"
        )
    return x, None
