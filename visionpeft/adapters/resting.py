"""Which parameters of adapters have gradients: those in use. Others rest, and are frozen until they are used again."""

from collections.abc import Iterable

import torch.nn as nn

from visionpeft.adapters.adapters import Adapters
from visionpeft.adapters.attached_adapter import join
from visionpeft.adapters.installation import Rested


def head_in_use(peft: Adapters, path: str) -> str | None:
    """Which active adapter's head is used: that of the last one."""
    return next((name for name in reversed(peft.chosen) if path in peft[name].head_paths), None)


def parameters_in_use(peft: Adapters) -> list[nn.Parameter]:
    """Parameters of the adapters that act or are routed here, without heads that another one's head stands in for."""
    return _parameters_of(peft, peft.chosen if peft.route is None else None, peft.route or ())


def _parameters_of(peft: Adapters, active: tuple[str, ...] | None, routed: Iterable[str | None]) -> list[nn.Parameter]:
    names = active if active is not None else tuple(dict.fromkeys(filter(None, routed)))
    unused = set()
    for name in active or ():
        for path in peft[name].head_paths:
            if head_in_use(peft, path) != name:
                unused |= set(peft[name].get_submodule(path).parameters())
    return [*dict.fromkeys(p for name in names for _, _, p in peft.anatomy(name).parameters() if p not in unused)]


def freeze_unused(peft: Adapters, passing: bool) -> None:
    """Let `requires_grad` follow what acts, or the routes that are open with gradients: DDP waits for gradients of
    everything that has it.

    What was frozen before it came to rest stays frozen when it acts again.
    """
    routed = [name for opened in peft.routing.opened if opened.trains for name in opened.names]
    active = None if routed else peft.chosen
    used = frozenset(peft.chosen if active is not None else filter(None, routed))
    in_use = {id(p) for p in _parameters_of(peft, active, routed)} if active is not None or not passing else set()
    for name in [name for name in peft if not passing or name in used or name in peft.used]:
        if passing and name not in used:
            _rest(peft, name)
        elif passing and routed:
            _use_again(peft, name)
        else:
            _settle(peft, name, in_use)
    peft.used = used


def _settle(peft: Adapters, name: str, in_use: set[int]) -> None:
    """Freeze what is not in use of an adapter, and no longer what came to rest and is in use."""
    resting = set(peft.resting.get(name, ()))
    for owner, key, parameter in peft.anatomy(name).parameters():
        if parameter.requires_grad:
            if id(parameter) not in in_use:
                parameter.requires_grad_(False)
                resting.add(join(owner, key))
        elif id(parameter) in in_use and join(owner, key) in resting:
            parameter.requires_grad_(True)
            resting.remove(join(owner, key))
    peft.resting[name] = frozenset(resting)


def _rest(peft: Adapters, name: str) -> None:
    """Freeze all of an adapter."""
    seen = peft.rested.get(name)
    if seen is None or not seen.everything or not seen.holds(True):
        anatomy = peft.anatomy(name)
        places = [place for place in anatomy.parameters() if place[2].requires_grad]
        seen = peft.rested[name] = Rested(anatomy, places)
    for _, _, parameter in seen.places:
        parameter.requires_grad = False
    before = peft.resting.get(name)
    peft.resting[name] = before | seen.paths if before else seen.paths


def _use_again(peft: Adapters, name: str) -> None:
    """No longer freeze what has come to rest of an adapter."""
    seen, resting = peft.rested.get(name), peft.resting.get(name)
    if not resting:
        return
    if seen is None or resting is not seen.paths or not seen.holds(False):
        _settle(peft, name, {id(parameter) for parameter in peft[name].parameters()})
        return
    for _, _, parameter in seen.places:
        parameter.requires_grad = True
    peft.resting[name] = frozenset()
