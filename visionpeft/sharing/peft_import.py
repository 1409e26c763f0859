"""Attach an adapter that HF peft wrote for the same backbone."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Set
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open

from visionpeft.adapters.attach import register
from visionpeft.adapters.attached_adapter import AttachedAdapter, nest, own_copy, training_dtype
from visionpeft.adapters.switch import activate, plain
from visionpeft.errors import StorageError
from visionpeft.sharing import peft_ia3, peft_lora
from visionpeft.sharing.peft_changes import CHANGES
from visionpeft.sharing.peft_config import PeftConfig, read_config
from visionpeft.sharing.peft_modules import peft_modules, trained_biases

PREFIX = "base_model.model."
PARTS = (
    *("lora_A", "lora_B", "lora_magnitude_vector", "lora_diag", "ia3_l", "hira_A", "hira_B", "miss_block"),
    *("oft_R", "boft_R", "boft_s"),
)
TENSOR = re.compile(rf"(?P<path>.+)\.(?P<part>{'|'.join(PARTS)})(\.weight)?")


# peft_type -> how its changes are split into the sites of methods
FORMATS = {"LORA": peft_lora, "IA3": peft_ia3} | CHANGES


def import_peft(model: nn.Module, folder: str | Path, name: str = "default") -> str:
    """Attach what peft's `save_pretrained` wrote of LoRA, DoRA, IA3, HiRA, MiSS, OFT or BOFT: equal logits.

    It is activated alone.

    Where peft adapts a fused qkv with one A, the sites q, k and v each get a copy of it and their rows of B. They
    compute the same, but are trained separately from here on, so that there are more parameters. Modules that peft
    trained whole (`modules_to_save`) become the adapter's head and trained copies, and so do biases (`bias="all"`). A
    head that LoRA changes, as with `target_modules="all-linear"`, becomes the adapter's head with the change in its
    weight, and is trained whole; so is one of which peft trained the bias alone. What PiSSA, OLoRA and KaSA took out of
    the backbone's weights is made again as a part of the change, of up to twice the rank and without dropout; the
    weights stay as they are. The file does not say which weights the backbone had: give the ones the adapter was
    trained on.

    Args:
        model: the backbone, as it was given to peft.
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        name: name of the attached adapter.

    Returns:
        The name of the adapter.

    Raises:
        StorageError: the files are damaged, contradict each other, do not fit the backbone, or ask for something that
            is not computed here; nothing is changed.
        UnsupportedError: peft is wrong at a module, so that there is nothing right to be equal to.
    """
    what = f"the peft adapter in {folder}"
    config, tensors = read_peft(folder)
    with plain(model):
        made_for = config.auto_mapping.get("base_model_class", type(model).__name__)
        if made_for != type(model).__name__:
            raise StorageError(f"{what} was made for a {made_for}, not for a {type(model).__name__}")
        backbone, modules = peft_modules(model)
        changes, whole = _sort(tensors if config.bias == "none" else _in_the_model(tensors), what)
        form = FORMATS[config.peft_type]
        of_heads = {path: changes.pop(path) for path in backbone.heads if path in changes and form is peft_lora}
        _check_targets(model, config, changes.keys() | of_heads.keys(), changes, modules, what)
        _check_whole(model, config, changes.keys() | of_heads.keys(), whole, what)
        parts = [part for path in changes for part in form.split(config, modules[path], changes[path], what)]
        heads = {path: _head(model, path, whole, what) for path in backbone.heads if _is_within(path, whole)}
        for path, change in of_heads.items():
            head = heads.get(path, own_copy(model.get_submodule(path)))
            heads[path] = _changed_head(head, path, config, change, what)
        trained = [name for name in whole if not name.startswith(tuple(f"{path}." for path in heads))]
        methods = tuple(form.methods(config, backbone, parts, what))
        adapter = AttachedAdapter(methods, backbone, head=False, train=tuple(trained))
    for path, head in heads.items():
        nest(adapter, path, head.to(training_dtype(next(model.parameters()))))
    adapter.head_paths = tuple(heads)
    adapter.to(next(model.parameters()).device)
    state = {part.place: part.tensors for part in parts}
    for _, placement in adapter.placements:
        placement.module.load_state_dict(state[placement.tower, placement.block, placement.site])
    with torch.no_grad():
        for parameter_name, parameter in adapter.trained_parameters():
            parameter.copy_(whole[parameter_name])
    register(model, name, adapter, backbone)
    activate(model, name)
    return name


def read_peft(folder: str | Path) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """Configuration and tensors of an adapter that peft wrote; the tensors by their names in the model.

    Raises:
        StorageError: the files are missing or damaged, or the tensors are in a pickle.
    """
    folder = Path(folder)
    description, path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise StorageError(
            f"{folder} holds adapter_model.bin, a pickle that can run code when it is read; write it again with peft's "
            "save_pretrained, which makes adapter_model.safetensors"
        )
    for file in (description, path):
        if not file.is_file():
            raise StorageError(f"{folder} holds no {file.name}; give the folder that peft's save_pretrained wrote")
    try:
        config = read_config(json.loads(description.read_text(encoding="utf-8")), str(description))
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except StorageError:
        raise
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise StorageError(f"the peft adapter in {folder} is damaged: {error}") from None
    for key, value in tensors.items():
        if not key.startswith(PREFIX) or not value.is_floating_point():
            raise StorageError(f"{path} holds {key!r} of type {value.dtype}, which peft does not write for a model")
    return config, {key.removeprefix(PREFIX): value for key, value in tensors.items()}


def _sort(tensors: dict[str, torch.Tensor], what: str) -> tuple[dict, dict]:
    """Tensors of changes, by module and part of the method, and those of modules trained whole, by name."""
    changes: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    whole = {}
    for key, value in tensors.items():
        if found := TENSOR.fullmatch(key):
            changes[found["path"]][found["part"]] = value
        else:
            whole[key] = value
    if not changes:
        raise StorageError(f"{what} changes no layer")
    return dict(changes), whole


def _in_the_model(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as the model has them: peft puts parts of its own into those of biases that are trained by themselves.

    Of a module that is trained whole it writes the bias three times, of which one has the model's name.
    """
    again = (".modules_to_save.", ".original_module.")
    return {
        key.replace(".base_layer.bias", ".bias"): value
        for key, value in tensors.items()
        if not any(part in key for part in again)
    }


def _is_within(path: str, names: Iterable[str]) -> bool:
    return any(name.startswith(f"{path}.") for name in names)


def _check_targets(
    model: nn.Module, config: PeftConfig, changed: Set[str], changes: dict, modules: dict, what: str
) -> None:
    """What has tensors must be what peft would wrap, and something we can adapt."""
    for path in changes:
        if path not in modules:
            raise StorageError(
                f"{what} changes {path}, which is no linear layer or convolution in or before the blocks of this "
                "backbone; a classification head is trained whole (modules_to_save) instead"
            )
        modules[path].require()
    linear = {p for p, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and not p.startswith("peft.")}
    targeted = {path for path in linear if config.targets(path)}
    if wrong := sorted(targeted ^ changed):
        has = "no tensors" if wrong[0] in targeted else "tensors"
        raise StorageError(
            f"{what} has {has} for {wrong[0]}, which its adapter_config.json "
            f"{'targets' if wrong[0] in targeted else 'does not target'}: one of the two files was changed"
        )


def _check_whole(
    model: nn.Module, config: PeftConfig, changed: Set[str], whole: dict[str, torch.Tensor], what: str
) -> None:
    """What is trained whole must be in `modules_to_save`, which peft matches by the ends of names, or be a `bias`."""
    saved = [
        f"{path}."
        for path, _ in model.named_modules()
        if not path.startswith("peft") and any(path.endswith(name) for name in config.modules_to_save or ())
    ]
    for inner in saved:
        if outer := next((path for path in saved if path != inner and inner.startswith(path)), None):
            raise StorageError(
                f"{what} trains {inner[:-1]} whole and {outer[:-1]} around it (modules_to_save), for which peft writes "
                "two copies under the same names and reads neither"
            )
    parameters = dict(model.named_parameters())
    expected = {name for name in parameters if name.startswith(tuple(saved))}
    expected |= trained_biases(model, config.bias, changed)
    if wrong := sorted(expected ^ whole.keys()):
        place = "is missing in" if wrong[0] in expected else "is not expected in"
        by = f"modules_to_save={config.modules_to_save} and bias={config.bias!r}"
        raise StorageError(f"{wrong[0]} {place} {what}, by {by}")
    heads = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, nn.Linear))
    for name, value in whole.items():
        if value.shape != parameters[name].shape and not name.startswith(heads):
            raise StorageError(
                f"{name} of {what} is {tuple(value.shape)}, in this backbone {tuple(parameters[name].shape)}"
            )


def _changed_head(head: nn.Module, path: str, config: PeftConfig, tensors: dict, what: str) -> nn.Linear:
    """A linear head with the change that peft gives its weight."""
    if type(head) is not nn.Linear:
        raise StorageError(f"{what} changes {path}, which is no linear head in this model")
    change = peft_lora.read_change(config, path, head.weight, tensors, what)
    head.weight.data = change.of(head.weight).to(head.weight.dtype)
    return head


def _head(model: nn.Module, path: str, whole: dict[str, torch.Tensor], what: str) -> nn.Linear:
    """A linear head with its tensors; it may have another number of classes than the model's own.

    Where only its bias was trained, it keeps the model's own weight.
    """
    own = model.get_submodule(path)
    weight, bias = whole.get(f"{path}.weight", getattr(own, "weight", None)), whole.get(f"{path}.bias")
    if not isinstance(own, nn.Linear) or weight.dim() != 2 or weight.shape[1] != own.in_features:
        shape = None if weight is None else tuple(weight.shape)
        raise StorageError(f"{path}.weight of {what} is {shape}, which is no linear head for this model")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise StorageError(f"{path}.bias of {what} is {tuple(bias.shape)} for {weight.shape[0]} classes")
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    head.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return head
