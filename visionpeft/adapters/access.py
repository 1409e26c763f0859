"""How the functions of this package come to a model: through what `torch.compile` or others put around it, in turns.

Switching adapters changes the classes of the model's modules. So within `use`, and while a function of ours changes a
model, a thread has it alone, and others that ask for it wait. Routes change nothing: any number of threads are within
routes of a model together, and who wants it alone waits until they have left.
"""

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch.nn as nn
from torch.jit import ScriptModule

from visionpeft.backbones.wrapped import check_not_wrapped
from visionpeft.errors import ConfigurationError


class Turns:
    """Who has a model: one thread alone, as often as it asks, or several beside one another."""

    def __init__(self):
        self._changed = threading.Condition()
        self._alone: int | None = None
        self._depth = 0
        self._beside: Counter[int] = Counter()
        self._waiting: Counter[int] = Counter()  # threads that want the model alone

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the context, other threads wait that ask for it, too.

        Raises:
            ConfigurationError: if it would wait for ever, for a thread that is within a route and waits for this one.
        """
        me = threading.get_ident()
        with self._changed:
            if self._alone != me:
                if me in self._beside and any(other in self._beside for other in self._waiting):
                    raise ConfigurationError(
                        "two threads that are within routes of one model want to change it, so that each would wait "
                        "for the other; leave the route first"
                    )
                self._waiting[me] += 1
                try:
                    self._changed.wait_for(lambda: self._alone is None and not self._others(me))
                finally:
                    del self._waiting[me]
                    self._changed.notify_all()
                self._alone = me
            self._depth += 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if self._depth == 0:
                    self._alone = None
                    self._changed.notify_all()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Within the context, threads that want the model alone wait."""
        me = threading.get_ident()
        with self._changed:
            if self._alone != me and me not in self._beside:  # those who have waited for long go first
                self._changed.wait_for(lambda: self._alone is None and not self._waiting)
            self._beside[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._beside[me] -= 1
                if self._beside[me] == 0:
                    del self._beside[me]
                    self._changed.notify_all()

    def _others(self, me: int) -> bool:
        return any(thread != me for thread in self._beside)


_TURNS: WeakKeyDictionary[nn.Module, Turns] = WeakKeyDictionary()  # not in the model, which is copied, pickled
_GUARD = threading.Lock()


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile(model)` gave a compiled form of; any other model itself.

    And the model whose attributes something around it passes on as its own, as Lightning Fabric's `setup` does: what is
    called `peft` and `head` there is not in one place, so that each would be looked for in the wrong one.

    Raises:
        UnsupportedError: it is TorchScript.
    """
    if isinstance(model, ScriptModule):
        check_not_wrapped(model)
    while isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
        model = inner
    for name in ("peft", "merged_peft") if isinstance(model, nn.Module) else ():
        if isinstance(adapters := getattr(model, name, None), nn.Module):
            kept = ((part, (part._modules | vars(part)).get(name)) for part in model.modules())
            return next((part for part, own in kept if own is adapters), model)
    return model


def _turns(model: nn.Module) -> Turns:
    with _GUARD:
        return _TURNS.setdefault(model, Turns())


def alone_with(model: nn.Module):
    """A context within which other threads that ask for this model wait; this thread may ask again."""
    return _turns(model).alone()


def beside_others(model: nn.Module):
    """A context within which threads wait that want to change this model."""
    return _turns(model).beside()


def on_model(function: Callable) -> Callable:
    """Decorate a function of a model with adapters: it gets the uncompiled model, alone, and returns the one given."""

    @functools.wraps(function)
    def called(model: nn.Module, *args, **kwargs):
        inner = uncompiled(model)
        with alone_with(inner):
            result = function(inner, *args, **kwargs)
        return model if result is inner else result

    return called
