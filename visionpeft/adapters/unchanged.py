"""Is a model still the one to which its adapters were attached? What was changed by hand since is refused."""

from collections.abc import Iterable

import torch.nn as nn

from visionpeft.adapters.adapters import Adapters
from visionpeft.adapters.attached_adapter import AttachedAdapter
from visionpeft.backbones.quantised import is_quantised
from visionpeft.errors import ConfigurationError

WRAPPED = "_checkpoint_wrapped_module"  # where PyTorch's CheckpointWrapper has the module


def remember_hosts(model: nn.Module, adapter: AttachedAdapter) -> None:
    """Remember in the place of which modules the heads of an adapter will compute.

    Raises:
        ConfigurationError: the model has no such module.
    """
    hosts = {path: _at(model, path) for path in adapter.head_paths}
    if missing := [path for path, host in hosts.items() if not isinstance(host, nn.Module)]:
        raise ConfigurationError(f"the adapter has a head {missing[0]!r}, but the model has no module of this name")
    adapter.hosts = {path: (host,) for path, host in hosts.items()}


def check_unchanged(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse adapters whose head or trained copies are those of another head or parameter than the model has now, or
    were quantised, and a model in which what acts was taken out, or stands behind a wrapper.

    Raises:
        ConfigurationError: naming what was changed.
    """
    for name in names:
        adapter: AttachedAdapter = model.peft[name]
        changed = [path for path, (host,) in adapter.hosts.items() if _at(model, path) is not host]
        for path, trained in adapter.trained_parameters():
            if getattr(_at(model, path), "shape", None) != trained.shape:
                changed.append(path)
        if quantised := next((path for path, p in adapter.named_parameters() if is_quantised(p)), None):
            raise ConfigurationError(
                f"{quantised!r} of adapter {name!r} was quantised with the model and is trained no more; quantise the "
                "layers of the backbone alone, before you attach"
            )
        if changed:
            raise ConfigurationError(
                f"{changed[0]!r} of the model was exchanged after adapter {name!r}, which trains a copy of the old "
                "one, was attached; detach the adapter, then change the model (reset_classifier, set_input_size), then "
                "attach it"
            )
    _check_in_place(model)


def _check_in_place(model: nn.Module) -> None:
    """Refuse a model of which modules are gone that were given classes to act, or are not where they were."""
    peft: Adapters = model.peft
    made = peft.installations.get(peft.chosen)
    if made is None or not peft.swapped:
        return
    paths = {module: path for path, module in model.named_modules(memo={peft})}
    for module, _, _ in peft.swapped:
        before, now = made.model.paths.get(module), paths.get(module)
        if now is None and before is not None:
            raise ConfigurationError(
                f"{before!r} of the model was taken out or exchanged while adapters acted in it; detach the adapters, "
                "change the model (prune, exchange or convert its layers), then attach them"
            )
        if now is not None and WRAPPED in now:
            raise ConfigurationError(
                f"{before!r} is within a CheckpointWrapper now, which gives all that is in it another name; take it "
                "out, and use visionpeft.economise(model, recompute='block') or the model's set_grad_checkpointing"
            )


def _at(model: nn.Module, name: str) -> nn.Module | nn.Parameter | None:
    """The module or the model's own parameter of this name."""
    path, _, last = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return None
    return owner._modules.get(last, owner._parameters.get(last))
