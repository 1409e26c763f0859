"""Which of the attached adapters act: for good, within a context, or one for each sample of a batch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn as nn

from visionpeft.adapters.access import alone_with, beside_others, on_model, uncompiled
from visionpeft.adapters.adapters import Adapters, attached, has_adapters, known
from visionpeft.adapters.install import install
from visionpeft.adapters.resting import freeze_unused
from visionpeft.adapters.route import Opened
from visionpeft.adapters.routes import routes_of
from visionpeft.errors import ConfigurationError
from visionpeft.sites.frozen_layers import traced
from visionpeft.sites.routing import OPEN


@on_model
def activate(model: nn.Module, names: str | Sequence[str]) -> nn.Module:
    """Let exactly these adapters act. Of several with a head, the last one's head is used.

    Args:
        model: a model with adapters.
        names: name of one adapter, or of several that act together.

    Raises:
        ConfigurationError: there is no adapter of that name.
        UnsupportedError: the adapters cannot act together.
    """
    _choose(model, names)
    return model


@on_model
def disable(model: nn.Module) -> nn.Module:
    """Let no adapter act: the model computes as it did before the first was attached.

    Args:
        model: a model with adapters.

    Raises:
        ConfigurationError: the model has no adapters, or they are merged.
    """
    _choose(model, ())
    return model


@contextmanager
def use(model: nn.Module, names: str | Sequence[str] | None) -> Iterator[nn.Module]:
    """Within the context, let exactly these adapters act, or none for None. Call `backward` inside it, too.

    Other threads that call `use` or `route` wait until the context ends; one that calls the model outside of any such
    context is not held up, and computes with whatever acts. Within a route, the route stands aside.

    Args:
        model: a model with adapters.
        names: name of one adapter, or of several that act together.

    Raises:
        ConfigurationError: there is no adapter of that name.
        UnsupportedError: the adapters cannot act together.
    """
    inner = uncompiled(model)
    with alone_with(inner):
        peft = attached(inner)
        before = peft.chosen
        unrouted = OPEN.set(((peft.routing, None), *OPEN.get()))
        try:
            _choose(inner, names or (), passing=True)
            yield model
        finally:
            OPEN.reset(unrouted)
            peft.chosen = before
            install(inner, passing=True)


@contextmanager
def plain(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model computes without adapters, whether it has any or not."""
    with alone_with(model):
        peft = model.peft if has_adapters(model) else None
        if peft is None or not (peft.chosen or peft.swapped):
            yield model
            return
        before, peft.routing.suspended = peft.routing.suspended, True
        try:
            with use(model, None):
                yield model
                peft.routing.suspended = before
        finally:
            peft.routing.suspended = before


def _choose(model: nn.Module, names: str | Sequence[str], passing: bool = False) -> None:
    peft = attached(model)
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        known(peft, name)
    before = peft.chosen
    peft.chosen = tuple(dict.fromkeys(names))
    try:
        install(model, passing)
    except Exception:  # whatever failed: leave the model as it was, then raise
        peft.chosen = before
        install(model)
        raise


@contextmanager
def route(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Within the context, sample i of a batch goes through adapter names[i], or through the plain backbone for None.

    Row i of the result is what that adapter alone gives. Call `backward` inside the context, too. The route is seen
    in this context alone (`contextvars`): other threads may be within routes of their own at the same time, and a
    thread outside of any computes with the active adapters. What changes the model (`use`, `attach`, `detach` and
    others) waits until the routes of other threads end. `requires_grad` of the adapters is the model's, so that
    entered with gradients a route counts for all threads: train in one.

    Args:
        model: a model with adapters.
        names: for each sample of the batch the name of its adapter, or None.

    Raises:
        ConfigurationError: no names are given, or there is no adapter of such a name.
        UnsupportedError: if an adapter cannot act on single rows exactly.
    """
    route = tuple(names) if isinstance(names, Iterable) and not isinstance(names, str) else ()
    if not route:
        raise ConfigurationError(
            f"route needs a list with the name of an adapter, or None, for each sample of the batch, not {names!r}; to "
            "let one adapter, or none, act on a whole batch call use"
        )
    inner = uncompiled(model)
    with beside_others(inner):
        peft = attached(inner)
        for name in dict.fromkeys(filter(None, route)):
            known(peft, name)
        opened = Opened(routes_of(peft).route(inner, route), trains=torch.is_grad_enabled())
        _note(peft, opened, peft.routing.opened.append)
        routed = OPEN.set(((peft.routing, opened), *OPEN.get()))
        try:
            yield model
        finally:
            OPEN.reset(routed)
            _note(peft, opened, peft.routing.opened.remove)
            if not traced():
                # What is written between routes may count no versions, and to stack anew costs less than to compare.
                opened.route.let_go()


def _note(peft: Adapters, opened: Opened, change: Callable[[Opened], None]) -> None:
    """Note that a route was opened or left; one with gradients decides what is frozen."""
    with peft.routing.changing:
        change(opened)
        if opened.trains:
            freeze_unused(peft, passing=True)
