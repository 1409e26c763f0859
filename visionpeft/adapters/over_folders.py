"""Attach methods over saved adapters, which are named by their folders."""

import dataclasses
from collections.abc import Iterable, Sequence

import torch.nn as nn

from visionpeft.adapters.attach import attach, detach
from visionpeft.adapters.sources import used_by
from visionpeft.adapters.storage import load
from visionpeft.methods.parts.base import Method
from visionpeft.methods.parts.frozen_sources import OverAdapters


def attach_over_folders(
    model: nn.Module, methods: Sequence[Method], name: str = "default", train: Iterable[str] = ()
) -> None:
    """`attach`, where the `adapters` of a method are folders that `save` wrote. They are loaded, and taken off again.

    Args:
        model: a model without adapters.
        methods: one or several methods.
        name: name of the new adapter.
        train: names of further parameters to train.

    Raises:
        StorageError: a folder holds no intact adapter of this backbone; nothing is changed.
        ConfigurationError: see `attach`.
    """
    names = {folder: f"source {number}" for number, folder in enumerate(sorted(used_by(methods)))}
    loaded = []
    try:
        for folder, source in names.items():
            loaded.append(load(model, folder, source))
        attach(model, [_over_names(method, names) for method in methods], name, train=train)
    finally:
        for source in loaded:
            detach(model, source)


def _over_names(method: Method, names: dict[str, str]) -> Method:
    if not isinstance(method, OverAdapters):
        return method
    return dataclasses.replace(method, adapters=tuple(names[folder] for folder in method.adapters))
