"""Runs a copy of a part of the user's model without the hooks that the user has put on it.

A hook that collects features, or logs, must see the calls of the user's model and no others.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.nn as nn

T = TypeVar("T")

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


def unwatched_copy(item: T, module: nn.Module) -> T:
    """A deep copy of an object in which no hook watches the calls of a module and its parts.

    Hooks are left out before copying, not removed after it: what a hook has collected may be large, and some cannot be
    copied.

    Args:
        item: the object, with the module inside.
        module: the module.
    """
    memo: dict[int, object] = {}
    for part in module.modules():
        for name in HOOKS:
            memo[id(getattr(part, name))] = OrderedDict()
    return copy.deepcopy(item, memo)


@contextmanager
def without_global_hooks() -> Iterator[None]:
    """Within the context, hooks that watch every module of the program (`register_module_forward_hook`) are silent."""
    registries = [getattr(nn.modules.module, f"_global{name}", None) for name in HOOKS]
    registries = [registry for registry in registries if registry]
    kept = [OrderedDict(registry) for registry in registries]
    for registry in registries:
        registry.clear()
    try:
        yield
    finally:
        for registry, hooks in zip(registries, kept, strict=True):
            registry.update(hooks)
