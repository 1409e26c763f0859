"""Attached adapters that become part of a new one, and stay frozen in it."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn

from visionpeft.adapters.adapters import Adapters
from visionpeft.adapters.attached_adapter import AttachedAdapter, check_allocated
from visionpeft.errors import ConfigurationError
from visionpeft.methods.parts.base import Method
from visionpeft.methods.parts.frozen_sources import OverAdapters

# Of each method of a new adapter, the tensors of its sources in their order, by path below their method.
Given = list[list[Mapping[str, torch.Tensor]]]


def with_sources(peft: Adapters | None, methods: Sequence[Method]) -> tuple[tuple[Method, ...], Given]:
    """Methods that know the adapters they are over, and the tensors of those.

    Args:
        peft: the adapters of the model, None if it has none.
        methods: of the new adapter.

    Raises:
        ConfigurationError: an adapter is not attached, or cannot be frozen inside another.
    """
    found, given = [], []
    for method in methods:
        if not isinstance(method, OverAdapters):
            found.append(method)
            given.append([])
            continue
        if method.sources is not None:  # which they are, only a saved adapter says
            raise ConfigurationError(f"{type(method).__name__}: sources are found, not given; name adapters instead")
        folded = {name: _folded(method, peft, name) for name in method.adapters}
        found.append(method.over({name: source for name, (source, _) in folded.items()}) if folded else method)
        given.append([tensors for _, tensors in folded.values()])
    return tuple(found), given


def used_by(methods: Sequence[Method]) -> set[str]:
    """Names of the adapters that methods are over."""
    return {name for method in methods if isinstance(method, OverAdapters) for name in method.adapters}


def fill(adapter: AttachedAdapter, given: Given) -> None:
    """Give the frozen modules of a made adapter the tensors of its sources."""
    for index, placement in adapter.placements:
        if not given[index]:
            continue
        path = [placement.tower, *([] if placement.block is None else [str(placement.block)])]
        prefix = ".".join([*path, placement.name or placement.site]) + "."
        for module, tensors in zip(placement.module.frozen, given[index], strict=True):
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            module.load_state_dict(own)


def _folded(method: OverAdapters, peft: Adapters | None, name: str) -> tuple[Method, dict[str, torch.Tensor]]:
    """The single method of an attached adapter as it would be saved, and its tensors."""
    if peft is None or name not in peft:
        attached = ", ".join(peft or ()) or "none"
        raise ConfigurationError(
            f"{type(method).__name__}: there is no adapter {name!r} on this model; attached are: {attached}. Load it "
            f"first (visionpeft.load(model, folder, {name!r}))"
        )
    adapter: AttachedAdapter = peft[name]
    check_allocated(adapter)
    if len(adapter.methods) != 1 or adapter.trained_names:
        more = f"trains {adapter.trained_names[0]!r}" if adapter.trained_names else "has several methods"
        raise ConfigurationError(
            f"{type(method).__name__}: adapter {name!r} {more}; it takes adapters of {method.kinds_in_words()} alone"
        )
    (key,) = adapter.method_keys
    saved, part = adapter.methods[0].fold(adapter._modules.get(key, nn.ModuleDict()))
    return saved, {path: value.detach().clone() for path, value in part.state_dict().items()}
