"""Start an adapter from a saved one, and find out from which: SPoT (Vu et al., 2022), https://arxiv.org/abs/2110.07904.

Su et al., On Transferability of Prompt Tuning for Natural Language Processing, 2022, compares measures of similarity.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn

from visionpeft.adapters.access import on_model
from visionpeft.adapters.adapters import attached, chosen_name
from visionpeft.adapters.attach import detach
from visionpeft.adapters.attached_adapter import AttachedAdapter, check_allocated
from visionpeft.adapters.storage import load
from visionpeft.adapters.switch import activate
from visionpeft.errors import ConfigurationError
from visionpeft.methods.parts.base import describe_method
from visionpeft.methods.parts.prompts import Prompts

DRAWN = ("dropout", "drop_path")  # fields that may differ: what is drawn in training shapes no tensor


@on_model
@torch.no_grad()
def start_from(model: nn.Module, folder: str | Path, name: str | None = None) -> nn.Module:
    """Give an attached adapter the values of a saved one of the same method: its training starts there.

    Its head stays as it is, as the classes may be others; so do optimisers, which hold the same parameters. Call it
    before the training. `visionpeft.fit` does it for `--model.start FOLDER`.
    Source: Vu et al., SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer, 2022, for prompts.

    Args:
        model: a model with adapters, the backbone of the saved one.
        folder: what `save` wrote.
        name: which adapter; may be left out if there is only one.

    Returns:
        The model.

    Raises:
        StorageError: the folder is damaged, or belongs to another backbone.
        ConfigurationError: the methods, or what else they train, differ. In either case nothing is changed.
    """
    adapter = _named(model, name)
    check_allocated(adapter)
    with _loaded(model, folder) as source:
        _require_alike(adapter, source, folder)
        own, found = adapter.state_dict(), source.state_dict()
        heads = tuple(f"{path}." for path in (*adapter.head_paths, *source.head_paths))
        values = {key: value for key, value in found.items() if not heads or not key.startswith(heads)}
        wanted = {key for key in own if not heads or not key.startswith(heads)}
        if values.keys() != wanted or any(value.shape != own[key].shape for key, value in values.items()):
            raise ConfigurationError(
                f"the tensors of the adapter in {folder} are not those of the one that is to start"
            )
        for key, value in values.items():
            own[key].copy_(value)
    return model


@on_model
@torch.no_grad()
def prompt_similarity(model: nn.Module, folders: Sequence[str | Path], name: str | None = None) -> dict[str, float]:
    """How similar the prompts of saved adapters are to those of an attached one: cosines by folder, the nearest first.

    Compared are the means over the tokens of the prompts, those of all blocks one after another; SPoT takes the source
    of the highest cosine, with a target that was trained for a little while. Give its folder to `start_from`.
    Source: Vu et al., SPoT, 2022.

    Args:
        model: a model with a `VPT` adapter.
        folders: what `save` wrote of `VPT` adapters with prompts in the same blocks, of any number.
        name: which adapter; may be left out if there is only one.

    Raises:
        StorageError: a folder is damaged, or belongs to another backbone.
        ConfigurationError: an adapter has no prompts, or has them in other blocks. Nothing is changed.
    """
    wanted, found = _mean_prompts(_named(model, name), "the adapter"), {}
    for folder in folders:
        with _loaded(model, folder) as source:
            mean = _mean_prompts(source, f"the adapter in {folder}")
        if mean.keys() != wanted.keys():
            raise ConfigurationError(f"the adapter in {folder} has its prompts in other blocks")
        both = (torch.cat([each[key] for key in wanted]) for each in (wanted, mean))
        found[str(folder)] = torch.cosine_similarity(*both, dim=0).item()
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _named(model: nn.Module, name: str | None) -> AttachedAdapter:
    peft = attached(model)
    return peft[chosen_name(peft, name, "is meant")]


@contextmanager
def _loaded(model: nn.Module, folder: str | Path) -> Iterator[AttachedAdapter]:
    """Within the context, a saved adapter is attached; then it is taken off and what acted acts again."""
    peft = attached(model)
    if peft.route is not None:
        raise ConfigurationError("a batch is being routed; start an adapter outside of route")
    before, name = peft.active, "a saved adapter that is read"
    load(model, folder, name)
    try:
        yield peft[name]
    finally:
        detach(model, name)
        activate(model, before)


def _require_alike(adapter: AttachedAdapter, source: AttachedAdapter, folder: str | Path) -> None:
    if [type(method) for method in adapter.methods] != [type(method) for method in source.methods]:
        words = [" and ".join(type(method).__name__ for method in each.methods) for each in (source, adapter)]
        raise ConfigurationError(f"the adapter in {folder} is {words[0]}, from which no {words[1]} can start")
    for own, other in zip(adapter.methods, source.methods, strict=True):
        fields, others = describe_method(own)["fields"], describe_method(other)["fields"]
        for field, value in fields.items():
            # as lists, which a file has for tuples
            same = others[field] == value or (isinstance(value, tuple | list) and list(others[field]) == list(value))
            if field not in DRAWN and not same:
                raise ConfigurationError(
                    f"the adapter in {folder} has {field} {others[field]!r} and the one that is to start {value!r}; "
                    f"attach {type(own).__name__} with the same"
                )
    if set(adapter.trained_names) != set(source.trained_names):
        raise ConfigurationError(f"the adapter in {folder} trains other parameters of the backbone (train=)")


def _mean_prompts(adapter: AttachedAdapter, what: str) -> dict[tuple, torch.Tensor]:
    """Mean over tokens of the prompts, as they enter, by tower and block."""
    found = {}
    for _, placement in adapter.placements:
        if isinstance(placement.module, Prompts):
            own = placement.module
            (projection,) = own._projection
            prompts = own.prompts if projection is None else projection(own.prompts)
            found[placement.tower, placement.block] = prompts.double().mean(dim=0)
    if not found:
        raise ConfigurationError(f"{what} has no prompts, which only VPT has")
    return found
