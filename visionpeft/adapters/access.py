"""How the functions of this package come to a model: through what `torch.compile` has put around it, one at a time.

Switching adapters changes the classes of the model's modules, so one model serves one thread at a time: within `use`
and `route`, and while a function of ours changes a model, other threads that ask for the same wait.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch.nn as nn

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = (
    WeakKeyDictionary()
)  # not in the model, which is copied, pickled
_GUARD = threading.Lock()


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile(model)` gave a compiled form of; any other model itself."""
    while isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
        model = inner
    return model


@contextmanager
def alone_with(model: nn.Module) -> Iterator[None]:
    """Within the context, other threads that ask for this model wait; this thread may ask again."""
    with _GUARD:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock:
        yield


def on_model(function: Callable) -> Callable:
    """Decorate a function of a model with adapters: it gets the uncompiled model, alone, and returns the one given."""

    @functools.wraps(function)
    def called(model: nn.Module, *args, **kwargs):
        inner = uncompiled(model)
        with alone_with(inner):
            result = function(inner, *args, **kwargs)
        return model if result is inner else result

    return called
