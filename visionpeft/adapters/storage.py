"""Save an adapter in a folder and load it again: `adapter.safetensors` and `adapter.json`."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import get_type_hints
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn

from visionpeft import methods as method_classes
from visionpeft.adapters.access import on_model
from visionpeft.adapters.adapters import attached, chosen_name
from visionpeft.adapters.attach import register
from visionpeft.adapters.attached_adapter import (
    AttachedAdapter,
    check_allocated,
    check_written,
    method_keys,
    nest,
    training_dtype,
)
from visionpeft.adapters.described_tensors import check_tensors, read_described, write_described
from visionpeft.adapters.description import FORMAT, check_description, check_number_of_names, described, names_of
from visionpeft.adapters.fingerprint import differences, same_weights, weights_record
from visionpeft.adapters.head_layout import check_reads, head_from_layout, head_layout
from visionpeft.adapters.stages import check_last_stage
from visionpeft.adapters.switch import plain
from visionpeft.adapters.unchanged import check_unchanged
from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.backbones.tower import Backbone
from visionpeft.backbones.whole_model import describe
from visionpeft.errors import ConfigurationError, StorageError, UserError, near_names
from visionpeft.extensions import classes_by_name
from visionpeft.methods.parts.base import Method, describe_method
from visionpeft.methods.parts.field_types import from_json
from visionpeft.sites.stand_ins import is_sharded

_MODULES = {"open_clip_torch": "open_clip"}  # packages whose module has another name
STEM = "adapter"
# findings/thop_leaves_its_counts_in_state_dicts.sh
COUNTS = ("total_ops", "total_params")

_REMEMBERED: WeakKeyDictionary[nn.Module, dict] = WeakKeyDictionary()  # of models that have been sharded since


@on_model
def save(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    *,
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    metadata: Mapping | None = None,
) -> None:
    """Write one adapter with its heads, the parameters it trained and the buffers of its heads.

    The old files stay valid until the new tensors are completely on disk.

    Args:
        model: a model with adapters.
        folder: where to write `adapter.safetensors` and `adapter.json`.
        name: which adapter; may be left out if there is only one.
        class_names: names of the classes, in the order of the logits.
        preprocessing: how images were prepared.
        metadata: anything else that JSON can hold, such as data set and result.

    Raises:
        ConfigurationError: it is not said which adapter, or what is said about it is not of these types or cannot be
            read again.
        UnsupportedError: some of its tensors cannot be written.
        StorageError: the folder cannot be written, or has files of these names that something else wrote.
    """
    peft = attached(model)
    name = chosen_name(peft, name, "to save")
    class_names = None if class_names is None else names_of(class_names)
    about = described(preprocessing, metadata)
    adapter: AttachedAdapter = peft[name]
    check_allocated(adapter)
    check_last_stage(adapter)
    check_unchanged(model, (name,))
    methods, tensors = folded(adapter)
    description = {
        "format": FORMAT,
        "methods": [describe_method(method) for method in methods],
        "train": list(adapter.train_names),
        "heads": {path: head_layout(adapter.get_submodule(path)) for path in adapter.head_paths},
        "backbone": backbone_record(model),
        "class_names": class_names,
        **about,
        "versions": package_versions(),
    }
    check_number_of_names(description)
    write_described(folder, STEM, tensors, description)


@torch.inference_mode(False)  # as `attach`
def load(model: nn.Module, folder: str | Path, name: str | None = None, *, check_fingerprint: bool = True) -> str:
    """Attach the adapter of a folder to the backbone it was trained on, and activate it alone.

    Args:
        model: the backbone; its head may have any number of classes, or be missing.
        folder: what `save` wrote.
        name: name of the attached adapter, by default "default".
        check_fingerprint: refuse a backbone whose weights differ from those the adapter was trained on.

    Returns:
        The name of the adapter.

    Raises:
        StorageError: if the folder is damaged or edited, or belongs to another backbone; nothing is changed.
    """
    description, tensors = read_saved(folder)
    name = name or "default"
    adapter, backbone = made_adapter(model, description, tensors, f"the adapter in {folder}", check_fingerprint)
    register(model, name, adapter, backbone, alone=True)
    return name


def read_saved(folder: str | Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Description and tensors of a saved adapter, checked; no model is needed.

    Raises:
        StorageError: if the folder holds no intact adapter.
    """
    return read_described(folder, STEM, check_description)


def made_adapter(
    model: nn.Module, description: dict, tensors: Mapping[str, torch.Tensor], what: str, check_fingerprint: bool = True
) -> tuple[AttachedAdapter, Backbone]:
    """The adapter that `read_saved` read, made for a backbone but not attached to it, and the described backbone.

    Args:
        model: the backbone.
        description: what the folder says of the adapter.
        tensors: its tensors.
        what: the adapter, for an error.
        check_fingerprint: refuse a backbone whose weights differ from those the adapter was trained on.

    Raises:
        StorageError: if it belongs to another backbone, or its parts do not fit each other.
    """
    methods = tuple(method_from(entry) for entry in description["methods"])
    if any(parameter.is_meta for parameter in model.parameters()):
        raise StorageError(
            f"the model has tensors without values (device 'meta'), which {what} cannot be compared with; load its "
            "weights first"
        )
    with plain(model):
        backbone = describe(model)
        actual = backbone_record(model, check_fingerprint, backbone)
        check_backbone(model, description["backbone"], actual, what)
        if description["heads"]:
            check_pooling(description["backbone"], actual, what)
        try:
            adapter = AttachedAdapter(methods, backbone, head=False, train=tuple(description["train"]))
            adapter.head_paths = tuple(description["heads"])
            for path, layout in description["heads"].items():
                head = head_from_layout(layout, model, path)
                check_reads(head, model)
                nest(adapter, path, head)
        except UserError:
            raise
        except (RuntimeError, TypeError, ValueError, KeyError) as error:  # sizes and names torch refuses
            reason = str(error).splitlines()[0]
            raise StorageError(f"what {what} describes cannot be made: {reason}") from None
    reference = next(model.parameters())
    adapter.to(reference.device)
    for path in adapter.head_paths:
        adapter.get_submodule(path).to(training_dtype(reference))
    check_tensors(tensors, adapter.state_dict(), what)
    adapter.load_state_dict(tensors)
    return adapter, backbone


def read_metadata(folder: str | Path) -> dict:
    """What `save` wrote about an adapter, checked; no model is needed.

    Args:
        folder: the folder.

    Raises:
        StorageError: if the folder holds no intact adapter.
    """
    return read_saved(folder)[0]


def folded(adapter: AttachedAdapter) -> tuple[list[Method], dict[str, torch.Tensor]]:
    """Methods and tensors of an adapter as they are saved; a method may be saved as another one, such as LoRA.

    Raises:
        UnsupportedError: some of its tensors cannot be written.
    """
    check_written(adapter)
    parts = [adapter._modules.get(key, nn.ModuleDict()) for key in adapter.method_keys]
    saved = [method.fold(part) for method, part in zip(adapter.methods, parts, strict=True)]
    methods = [method for method, _ in saved]
    own = tuple(f"{key}." for key in adapter.method_keys)
    tensors = {key: value for key, value in adapter.state_dict().items() if not key.startswith(own)}
    for key, (_, part) in zip(method_keys(methods), saved, strict=True):
        tensors |= {f"{key}.{name}": value for name, value in part.state_dict().items()}
    own = {key: value for key, value in tensors.items() if key.rpartition(".")[2] not in COUNTS}
    return methods, {key: value.detach().cpu().contiguous() for key, value in own.items()}


_version = cache(version)  # to find the files of four packages takes 3 ms, as long as to write a small adapter


def package_versions() -> dict[str, str]:
    """Versions of what a saved file depends on; OpenCLIP may not be installed."""
    packages = ("visionpeft", "torch", "timm", "open_clip_torch")
    return {package: _version(package) for package in packages if find_spec(_MODULES.get(package, package))}


def backbone_record(model: nn.Module, with_fingerprint: bool = True, backbone: Backbone | None = None) -> dict:
    """Where a backbone comes from, what it is, how it pools and, unless left out, the fingerprint of its weights.

    Args:
        model: the model.
        with_fingerprint: whether to hash its weights.
        backbone: what `describe` says of it, if that is known.
    """
    if model in _REMEMBERED and any(is_sharded(parameter) for parameter in model.parameters()):
        return dict(_REMEMBERED[model]) | ({} if with_fingerprint else {"fingerprint": None})
    backbone = backbone or describe(model)
    source = getattr(model, "backbone_source", None) or {"library": backbone.library, "name": backbone.name}
    record = {"source": source, "class": type(model).__name__, "architecture": backbone.name}
    if (pooling := backbone.pooling) is not None:  # not in files of earlier versions
        record["pooling"] = pooling
    if not with_fingerprint:
        return record | {"fingerprint": None}
    with plain(model):
        return record | weights_record(model, backbone)


def remember_backbone(model: nn.Module) -> None:
    """Hash a backbone that is about to be sharded, which `save` in one process could not; its weights stay as they are.

    Args:
        model: a model with adapters, whose blocks are then given to `fully_shard`, but not itself.
    """
    _REMEMBERED[model] = backbone_record(model)


def check_backbone(model: nn.Module, saved: dict, actual: dict, what: str) -> None:
    """Refuse a backbone that is not the one something was trained on.

    Raises:
        StorageError: another class, architecture or fingerprint.
    """
    for key in ("class", "architecture"):
        if saved[key] != actual[key]:
            raise StorageError(
                f"{what} belongs to {saved['architecture']} ({saved['class']}), "
                f"not to {actual['architecture']} ({actual['class']})"
            )
    if actual["fingerprint"] is None:
        return
    with plain(model):
        same = same_weights(model, saved, actual)
    if not same:
        reason = differences(saved, actual) or f"fingerprint {saved['fingerprint']}, here {actual['fingerprint']}"
        raise StorageError(
            f"{what} was trained on other weights of {saved['architecture']} than this model has ({reason}); load the "
            "weights named in its .json file (on the command line with --model.backbone and --model.checkpoint), "
            "or in Python pass check_fingerprint=False"
        )


def check_pooling(saved: dict, actual: dict, what: str) -> None:
    """Refuse a backbone with the same weights that pools its tokens in another way, where the pooled are read.

    Nothing is compared where the weights are not, or where one of the two does not say it.

    Raises:
        StorageError: it pools otherwise.
    """
    before, now = saved.get("pooling"), actual.get("pooling")
    if actual["fingerprint"] is not None and None not in (before, now) and before != now:
        raise StorageError(
            f"{what} was trained on {saved['architecture']} that pools by {before!r}, and this one of the same weights "
            f"pools by {now!r}; make it with that pooling (of timm, global_pool={before!r}), or in Python pass "
            "check_fingerprint=False"
        )


def method_from(entry: dict) -> Method:
    """The method that `describe_method` described, also an older version's, whose fields may be fewer.

    Raises:
        StorageError: this version has no such method, or it has other fields.
    """
    cls = _class_of(entry)
    try:
        types = get_type_hints(cls)
        fields = {**cls.written_without, **entry["fields"]}
        return cls(**{name: from_json(value, types.get(name)) for name, value in fields.items()})
    except (ConfigurationError, TypeError) as error:  # TypeError: a field that this version does not have
        reason = str(error).splitlines()[0]
        raise StorageError(f"the saved fields of {entry['class']} do not fit this version: {reason}") from None


def is_older(entry: dict) -> bool:
    """Whether a method was described by an older version that lacks a field, and did not act as its default says."""
    return not _class_of(entry).written_without.keys() <= entry["fields"].keys()


def _class_of(entry: dict) -> type[Method]:
    own = [getattr(method_classes, name) for name in method_classes.__all__ if name != "Method"]
    classes = classes_by_name(Method, own)
    if entry["class"] not in classes:
        known = near_names(entry["class"], classes)
        raise StorageError(
            f"the adapter was made by a method {entry['class']!r} this version does not have{known}; a method of your "
            "own must be imported first"
        )
    return classes[entry["class"]]
