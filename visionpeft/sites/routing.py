"""Which adapter acts on which row of a batch, as data of a call.

A route is open in a context of Python (`contextvars`): in the thread, or the task of an event loop, that has opened it.
The modules of a model that has been routed have a class that asks at each use whether a route is open here. If one is,
they compute with what it says, and if not, with what the active adapters have put there: no thread sees the route of
another, and opening one changes nothing in the model.
"""

import functools
import threading
from contextvars import ContextVar
from typing import Protocol

import torch
import torch.nn as nn

from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.sites.blocks import UNTOUCHED
from visionpeft.sites.stand_ins import StandIn, UsesHead

# What a routed module has in its `__dict__` besides what acts in it without a route.
KEPT = ("routing", "plans")


def in_backward() -> bool:
    """Whether a backward pass is computing in this thread, as where activations are computed again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Opened(Protocol):
    """A route that is open.

    Attributes:
        names: the adapter of each sample, or None for the plain backbone.
        plan: key of the plan by which modules look up what they compute with.
        differentiated: whether something was computed with gradients.
        refusal: why nothing can be computed any more, or None.
    """

    names: tuple[str | None, ...]
    plan: int
    differentiated: bool
    refusal: str | None


# The open routes of this context with the models they belong to, the last one first; None where a model is not routed.
OPEN: ContextVar[tuple[tuple["Routing", Opened | None], ...]] = ContextVar("visionpeft_routes", default=())


class Routing:
    """Stands for a model among the open routes.

    Attributes:
        opened: the routes that are open now, in all contexts.
        changing: held while modules are made ready for a route, or a route is noted as open.
        installed: whether the modules of the model have classes that ask for routes.
        routes: what is known of the model's routes.
        suspended: whether the model is to have its own classes although a route is open, while it is described.
    """

    def __init__(self):
        self.opened: list[Opened] = []
        self.changing = threading.RLock()
        self.installed = False
        self.routes = None
        self.suspended = False

    def __reduce__(self):
        return Routing, ()  # a copy of the model has routes of its own

    def current(self) -> Opened | None:
        """The route that is open in this context.

        Raises:
            ConfigurationError: it is no longer what it was when it was opened.
        """
        for routing, opened in OPEN.get():
            if routing is self:
                if opened is not None and opened.refusal is not None:
                    raise ConfigurationError(opened.refusal)
                return opened
        if self.opened and in_backward():
            return self._of_backward()
        return None

    def _of_backward(self) -> Opened | None:
        """The route of a backward pass, which computes blocks again in a thread of PyTorch's own, without context."""
        if not isinstance(threading.current_thread(), threading._DummyThread):
            return None
        found = [opened for opened in self.opened if opened.differentiated]
        if any(opened.names != found[0].names for opened in found):
            raise UnsupportedError(
                "several threads are within routes with gradients, so that it is not known whose activations are "
                "computed again; let them take turns, or keep activations"
            )
        return found[0] if found else None


class Routable:
    """Mixed into the class of a module of a model that has been routed; see `routable`.

    Attributes:
        routing: stands for the model.
        plans: for the key of a plan, what the module has while a route of this plan is open, by name.
    """

    unrouted: type[nn.Module]  # its class but for routes
    routing: Routing
    plans: dict[int, dict[str, object]]

    def __reduce_ex__(self, protocol):
        # A copy of the model is not routed, and decides for itself how it will be.
        original, state = self.unrouted, {key: value for key, value in self.__dict__.items() if key not in KEPT}
        if original.__reduce_ex__ is object.__reduce_ex__:
            return _empty, (original,), state
        return (*original.__reduce_ex__(self, protocol)[:2], state)


def of_route(module: Routable) -> dict[str, object] | None:
    """What a module has while the route of this context is open, by name; None if none is."""
    opened = module.__dict__["routing"].current()
    return None if opened is None else module.__dict__["plans"].get(opened.plan, {})


@functools.cache
def routable(active: type[nn.Module], routed: type[nn.Module] | None, names: tuple[str, ...]) -> type[nn.Module]:
    """The class of a module that computes by a route where one is open.

    Args:
        active: its class otherwise.
        routed: the sited class that it needs for routes, or None.
        names: the attributes that a route gives it. The name "routed" is the head for each row.
    """
    if routed is None or issubclass(active, routed):
        bases = (active,)
    elif issubclass(routed, active):
        bases = (routed,)
    else:  # what stands in for parameters, above what is sited
        bases = (active, routed)
    members: dict[str, object] = {"unrouted": active}
    members |= {key: getattr(active, key) for key in ("__module__", "__qualname__", "__doc__")}
    members |= {name: _given(name, bases) for name in names if name != "routed"}
    for kind in active.__mro__:
        for name in kind.__dict__.get("arguments", ()) if issubclass(kind, StandIn) else ():
            members[name] = _own_when_routed(name, kind)
    if issubclass(active, UsesHead) or "routed" in names:
        library = active.below if issubclass(active, UsesHead) else bases[0]
        members["forward"] = _forward_of_head(bases[0], library)
    return type(active.__name__, (Routable, *bases), members)


def _given(name: str, bases: tuple[type[nn.Module], ...]) -> property:
    """An attribute of the route, or else of the module."""
    nothing = {"sites": UNTOUCHED, "acting": (), "entering": ()}

    def read(self):
        given = of_route(self)
        if given is not None and (name in given or name in nothing):
            return given.get(name, nothing.get(name))
        if given is None and name in self.__dict__:
            return self.__dict__[name]
        inherited = next(
            (kind.__dict__[name] for base in bases for kind in base.__mro__ if name in kind.__dict__), None
        )
        if inherited is None:
            return nothing[name]
        return inherited.__get__(self) if hasattr(inherited, "__get__") else inherited

    return property(read, lambda self, value: self.__dict__.__setitem__(name, value))


def _own_when_routed(name: str, kind: type[nn.Module]) -> property:
    """What an adapter's tensor is read instead of without a route, and the module's own with one."""
    inherited = getattr(kind, name)

    def read(self):
        if of_route(self) is None:
            return inherited.fget(self)
        return self._parameters[name] if name in self._parameters else self.__dict__[name]

    return property(read)


def _forward_of_head(active: type[nn.Module], library: type[nn.Module]):
    def forward(self, x: torch.Tensor | list[torch.Tensor], *more):
        """Map pooled features (batch, width), or maps and what else the head takes, to what it gives."""
        given = of_route(self)
        if given is None:
            return active.forward(self, x, *more)
        own = functools.partial(library.forward, self)
        return given["routed"](x, own, *more) if "routed" in given else own(x, *more)

    return forward


def _empty(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)
