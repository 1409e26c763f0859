"""What a block cannot take: sites that it does not have, and what needs tokens in a line where they lie in a map."""

from collections.abc import Iterable

import torch.nn as nn

from visionpeft.adapters.asking import QUERIES
from visionpeft.adapters.attached_adapter import AttachedAdapter
from visionpeft.adapters.carried_values import CARRIERS
from visionpeft.backbones.tower import BlockSites, Tower
from visionpeft.errors import UnsupportedError
from visionpeft.sites import HEAD, NEXT_BLOCK, Order, order_of


def check_available(adapter: AttachedAdapter, tower: Tower) -> None:
    """Refuse an adapter that is to act in blocks or at sites that are not there, or adds tokens that nothing sees.

    Raises:
        UnsupportedError: naming the method, the site and the class of the block.
    """
    for index, placement in adapter.placements:
        if placement.tower != tower.name or placement.block is None:
            continue
        if placement.block >= tower.depth:
            raise UnsupportedError(
                f"{type(adapter.methods[index]).__name__} acts in block {placement.block} of the {tower.name} tower, "
                f"of which {tower.depth} blocks are found; detach the adapters before you change the model"
            )
        block = tower.blocks[placement.block]
        add = None if placement.add in (NEXT_BLOCK, HEAD) else placement.add
        missing = [site for site in (placement.site, add) if site is not None and not block.has(site)]
        if block.attention is None and order_of(placement.module) in (Order.ENTER, Order.ENTER_SPAN):
            raise UnsupportedError(
                f"{type(adapter.methods[index]).__name__} adds tokens, which blocks of class "
                f"{type(block.module).__name__} would never see: they have no attention"
            )
        if block.narrows(placement.site, add):
            raise UnsupportedError(
                f"{type(adapter.methods[index]).__name__} reads tokens at {placement.site} of block {placement.block} "
                f"and adds to those at {add}, which are fewer and wider: the first block of a stage pools its tokens; "
                "leave out such blocks, or what acts beside the attention"
            )
        if missing:
            reason = "which have no attention" if block.attention is None else "which do not have it"
            raise UnsupportedError(
                f"{type(adapter.methods[index]).__name__} acts at site {missing[0]!r} of blocks of class "
                f"{type(block.module).__name__}, {reason}"
            )


def check_on_map(block: BlockSites, acting: Iterable[tuple[str, str | None]], prompts: Iterable[nn.Module]) -> None:
    """Refuse what needs tokens in a line in a block whose tokens are the pixels of a map.

    Args:
        block: the block.
        acting: the sites in use, each with where what acts there is added.
        prompts: whose prompts would travel through the block as tokens.

    Raises:
        UnsupportedError: such prompts, carriers or tokens that ask.
    """
    if not block.on_map:
        return
    kind = type(block.module).__name__
    if list(prompts):
        raise UnsupportedError(
            f"the tokens of a {kind} are the pixels of a map, in which prompts have no place; they can be keys and "
            "values alone: VPT(deep=True), and beside it no method that acts on all tokens together"
        )
    if any(key in (CARRIERS, QUERIES) for key in acting):
        raise UnsupportedError(
            f"the tokens of a {kind} are the pixels of a map, beside which nothing is carried from block to block and "
            "into which no other tokens ask"
        )
