"""What acts where when several adapters are active together: their order, their prompts in each block, their tokens.

Nothing of a model is changed here; `install` does that.
"""

from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from visionpeft.adapters.adapters import Adapters
from visionpeft.adapters.attached_adapter import AttachedAdapter
from visionpeft.adapters.carried_values import check_carried
from visionpeft.backbones.tower import Tower
from visionpeft.errors import UnsupportedError
from visionpeft.sites import Located, OnPatches, Order, Sites, order_of

# (tower, block, site, where the result is added) -> modules in the order in which they act
Plan = dict[tuple[str, int | None, str, str | None], list[nn.Module]]


def plan_of(peft: Adapters, names: tuple[str, ...]) -> Plan:
    """What acts where when these adapters are active together, in the law of order."""
    entries = defaultdict(list)
    for name in names:
        adapter: AttachedAdapter = peft[name]
        for sequence, (index, placement) in enumerate(adapter.placements):
            # Equal orders go by the names of method and adapter, so that the order of attaching has no say; only the
            # modules of one method keep the order in which it placed them.
            rank = (order_of(placement.module), type(adapter.methods[index]).__name__, name, sequence)
            entries[placement.tower, placement.block, placement.site, placement.add].append((rank, placement.module))
    return {key: [module for _, module in sorted(acting, key=lambda e: e[0])] for key, acting in entries.items()}


def acting_in(tower: Tower, plan: Plan) -> dict[int | None, dict[tuple[str, str | None], list[nn.Module]]]:
    """What acts in each block of a tower, block None being the tower outside its blocks, at (site, add).

    What acts at `tokens` does so before the norm that precedes the blocks, or, without one, first in the first block.
    """
    acting: dict[int | None, dict] = defaultdict(dict)
    for (name, block, site, add), modules in plan.items():
        if name == tower.name:
            acting[block][site, add] = modules
    entering = None if "norm_pre" in tower.layers else acting.get(None, {}).pop(("tokens", None), None)
    if entering is not None:
        acting[0]["stream_in", None] = entering + acting[0].get(("stream_in", None), [])
    return dict(acting)


def travelling_prompts(tower: Tower, plan: Plan, peft: Adapters, names: Iterable[str]) -> list[list[nn.Module]]:
    """Whose prompts travel through each block, in the order in which they entered, when these adapters act.

    Refuses spans that overlap without one containing the other, or that shift tokens to be replaced by position.
    """
    # Spans open and close like brackets: prompts enter right after the prefix tokens, before the prompts that are there
    # already, and are removed from that place. So what leaves must be what entered last.
    owners = {p.module: (name, index) for name in names for index, p in peft[name].placements}
    open_spans: list[nn.Module] = []
    travelling = []
    check_carried(tower.name, plan)
    for index in range(tower.depth):
        enter = plan.get((tower.name, index, "stream_in", None), [])
        leave = plan.get((tower.name, index, "stream_out", None), [])
        if open_spans and any(order_of(module) == Order.REPLACE for module in enter):
            raise UnsupportedError(
                f"tokens of the {tower.name} tower cannot be replaced while shallow prompts travel through it; use "
                "VPT(deep=True)"
            )
        # Those that stay for several blocks enter before those of this block alone, as the law of order says.
        open_spans += [module for module in enter if order_of(module) == Order.ENTER_SPAN]
        travelling.append([*open_spans, *(module for module in enter if order_of(module) == Order.ENTER)])
        leaving = [owners[module] for module in leave if order_of(module) == Order.LEAVE_SPAN]
        staying = len(open_spans) - len(leaving)
        if sorted(owners[module] for module in open_spans[max(staying, 0) :]) != sorted(leaving):
            raise UnsupportedError(
                "shallow prompts of two adapters overlap in part; their block ranges must be nested or apart"
            )
        del open_spans[staying:]
    return travelling


def reading_all(tower: Tower, modules: Iterable[nn.Module]) -> str | None:
    """Name of a module that reads all patches of an image, in a tower where some may be padding; None if none does."""
    found = (type(each).__name__ for each in modules if getattr(each, "reads_all_patches", False))
    return next(found, None) if tower.masks_padding else None


def located_in(
    modules: list[nn.Module], first_patch: int, inside: list[nn.Module], sites: Sites | None = None
) -> tuple:
    """Modules with where the tokens are for those who treat some of them apart.

    Args:
        modules: what acts at one site.
        first_patch: number of tokens before the patches.
        inside: whose prompts travel through the block.
        sites: of the block, if tokens of a head may stand between these prompts and the patches.
    """

    def located(module: nn.Module) -> nn.Module | OnPatches | Located:
        if getattr(module, "patches_only", False):
            return OnPatches(module, first_patch, sites)
        place = getattr(module, "located_at", None)
        if place is None:
            return module
        # Prompts that enter later stand before those that are there.
        if place == "patches":
            return Located(module, first_patch, sites)
        after = inside[: inside.index(place) + 1]
        return Located(module, first_patch - sum(each.num_tokens for each in after))

    return tuple(map(located, modules))
