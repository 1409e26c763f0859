"""Which modules of several adapters are built alike, so that they can act as one (`together`).

What may act together says so. A class of modules that has `stackable = True` computes nothing in its `forward` but what
`torch.vmap` maps over rows; its tensors are found in it. One that has a method `by_row` computes all rows at once:

* `row_values() -> {name: tensor or number}`: what differs between adapters, numbers by the names of attributes;
* `padded = {name: dimension}`: where their sizes may differ, and zeros change nothing;
* `by_row(values, *inputs)`: what `forward(*inputs)` gives, with values (rows, ...) of which each row has its own.

Both count for the class that defines `forward`, and not for a subclass with another one.
"""

from collections.abc import Hashable, Iterator, Sequence

import torch
import torch.nn as nn

from visionpeft.sites import Located, OnPatches

Acts = nn.Module | OnPatches | Located

SIMPLE = (bool, int, float, str, bytes, type(None))
OF_MODULES = frozenset(vars(nn.Module()))  # attributes that every module has
# The parts of heads that may act together as they are.
PLAIN = (nn.Linear, nn.LayerNorm, nn.Sequential, nn.Identity, nn.Dropout, nn.BatchNorm1d)


def alike(acts: Acts, owned: set[nn.Module]) -> Hashable | None:
    """What modules have in common that can act together; None for one that acts alone.

    Args:
        acts: what acts at a site.
        owned: the modules of its adapter; others that it refers to are the backbone's, which all adapters share.
    """
    if isinstance(acts, OnPatches | Located):
        inner = alike(acts.module, owned)
        return None if inner is None else (type(acts), acts.first, inner)
    own = definition(acts)
    if "by_row" not in own and not own.get("stackable"):
        return None
    padded, numbers = own.get("padded", {}), ()
    if "by_row" in own:
        values = acts.row_values()
        numbers = tuple(name for name, value in values.items() if not isinstance(value, torch.Tensor))
        shapes = tuple(
            (name, value.dtype, _but(value.shape, padded.get(name)))
            for name, value in values.items()
            if name not in numbers
        )
        without = [tuple(_structure(m, owned)) for m in acts.children() if not any(True for _ in m.parameters())]
        return type(acts), numbers, shapes, tuple(_settings(acts, owned, numbers)), tuple(without)
    return tuple(_structure(acts, owned))


def alike_heads(head: nn.Module) -> Hashable | None:
    """What heads have in common that can act together; None for one that acts alone."""
    parts = list(head.modules())
    drawn = any(isinstance(part, nn.BatchNorm1d) and part.training for part in parts)
    if drawn or not all(type(part) in PLAIN for part in parts):
        return None
    return tuple(_structure(head, set(parts)))


def definition(module: nn.Module) -> dict:
    """What the class says of itself that defines the `forward` of a module."""
    return next((kind.__dict__ for kind in type(module).__mro__ if "forward" in kind.__dict__), {})


def _but(shape: torch.Size, dimension: int | None) -> tuple[int, ...]:
    return tuple(0 if index == dimension else size for index, size in enumerate(shape))


def _structure(module: nn.Module, owned: set[nn.Module]) -> Iterator[Hashable]:
    yield type(module)
    for kind in (module._parameters, module._buffers):
        for name, tensor in kind.items():
            yield name, None if tensor is None else (tuple(tensor.shape), tensor.dtype)
    yield from _settings(module, owned, ())
    for name, child in module._modules.items():
        yield name, None if child is None else tuple(_structure(child, owned))


def _settings(module: nn.Module, owned: set[nn.Module], but: Sequence[str]) -> Iterator[Hashable]:
    for name, value in sorted(vars(module).items()):
        if name in ("training", *but) or name in OF_MODULES:
            continue
        if isinstance(value, tuple) and any(isinstance(each, nn.Module) for each in value):
            yield name, tuple(tuple(_structure(m, owned)) if m in owned else id(m) for m in value)
        else:
            yield name, repr(value) if _is_simple(value) else id(value)


def _is_simple(value) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_simple, value))
    if isinstance(value, dict):
        return all(map(_is_simple, (*value, *value.values())))
    return isinstance(value, SIMPLE)
