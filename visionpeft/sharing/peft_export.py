"""Write an adapter in the format of HF peft."""

import json
import os
import shutil
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import save as serialise

from visionpeft.adapters.access import on_model
from visionpeft.adapters.adapters import attached, chosen_name
from visionpeft.adapters.attached_adapter import AttachedAdapter, check_written
from visionpeft.adapters.switch import plain
from visionpeft.errors import StorageError, UnsupportedError
from visionpeft.methods.boft import BOFT
from visionpeft.methods.capaboost import CapaBoost
from visionpeft.methods.dora import DoRA
from visionpeft.methods.eva import EVA
from visionpeft.methods.hira import HiRA
from visionpeft.methods.ia3 import IA3
from visionpeft.methods.lora import LoRA
from visionpeft.methods.lora_ga import LoRAGA
from visionpeft.methods.miss import MiSS
from visionpeft.methods.moslora import MoSLoRA
from visionpeft.methods.oft import OFT
from visionpeft.methods.olora import OLoRA
from visionpeft.methods.pissa import PiSSA
from visionpeft.methods.sora import SoRA
from visionpeft.methods.vblora import VBLoRA
from visionpeft.sharing import peft_ia3, peft_lora
from visionpeft.sharing.peft_changes import CHANGES
from visionpeft.sharing.peft_config import expression
from visionpeft.sharing.peft_import import FORMATS, PREFIX
from visionpeft.sharing.peft_modules import PeftModule, peft_modules, trained_biases

# PiSSA, OLoRA and LoRA-GA as LoRA of twice the rank: peft's own forms depend on a decomposition being made again, or
# on a gradient.
METHODS = {LoRA: peft_lora, DoRA: peft_lora, PiSSA: peft_lora, OLoRA: peft_lora, LoRAGA: peft_lora, IA3: peft_ia3}
METHODS |= {EVA: peft_lora, MoSLoRA: peft_lora, CapaBoost: peft_lora, SoRA: peft_lora, VBLoRA: peft_lora}
METHODS |= {HiRA: CHANGES["HIRA"], MiSS: CHANGES["MISS"], OFT: CHANGES["OFT"], BOFT: CHANGES["BOFT"]}
WITH_BIAS = ("LORA", "MISS", "OFT", "BOFT")  # those of which peft trains biases, too


@on_model
def export_peft(model: nn.Module, folder: str | Path, name: str | None = None) -> None:
    """Write an adapter with which peft's `PeftModel.from_pretrained` gives equal logits.

    Those of LoRA, DoRA, IA3, HiRA, MiSS, OFT and BOFT, and as LoRA those of EVA, PiSSA, OLoRA, LoRAGA, MoSLoRA, SoRA,
    CapaBoost and VBLoRA.

    peft adapts a fused qkv as one matrix. Changes of q, k and v that still share their A (after `import_peft`) become
    one of the same rank; others become one whose rank is the sum of theirs, B being zero outside their rows. peft then
    trains those zeros, too. For IA3 the rows of q get the scale 1. The head and modules trained whole become
    `modules_to_save`; peft needs a backbone made with a head for as many classes. Biases trained by themselves
    (`train=`, or after `import_peft`) become its `bias`, where they are all of the model or of the changed layers.

    Args:
        model: a model with adapters.
        folder: a folder that does not exist yet, or is empty; it appears complete or not at all.
        name: which adapter; may be left out if there is only one.

    Raises:
        UnsupportedError: peft has no such method, or is wrong at one of its modules; nothing is written.
        StorageError: the folder holds files, or cannot be written.
    """
    peft = attached(model)
    adapter: AttachedAdapter = peft[chosen_name(peft, name, "to export")]
    form = _format(adapter)
    check_written(adapter)
    with plain(model):
        changes = _by_module(model, adapter)
        kind = next(kind for kind, each in FORMATS.items() if each is form)
        paths = [module.path for module, _ in changes]
        biases = _biases(model, adapter, f"{kind.lower()}_only", paths) if kind in WITH_BIAS else None
        whole = _modules_to_save(model, adapter, biases)
        tensors, fields = form.join(changes)
    for module, _ in changes:
        if trained := [path for path in whole if f"{module.path}.".startswith(f"{path}.")]:
            raise UnsupportedError(f"peft does not adapt {module.path}, because {trained[0]} is trained whole")
    if biases is not None:
        tensors |= biases.tensors
        fields |= {"bias": biases.option}
    config = {
        "peft_type": kind,
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "target_modules": "|".join(expression(module.path) for module, _ in changes),
        "modules_to_save": list(whole) or None,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
    } | fields
    if kind != "MISS":  # which has no such option
        config["fan_in_fan_out"] = False
    tensors |= {f"{path}.{key}": value for path, state in whole.items() for key, value in state.items()}
    content = {PREFIX + key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    files = {
        "adapter_model.safetensors": serialise(content, metadata={"format": "pt"}),
        "adapter_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }
    _write_new(Path(folder), files)


def _format(adapter: AttachedAdapter):
    """The one format that all methods of an adapter have in peft."""
    kinds = dict.fromkeys(type(method) for method in adapter.methods)
    for kind in kinds:
        if kind not in METHODS:
            raise UnsupportedError(
                f"peft has no {kind.__name__} for this backbone; {', '.join(each.__name__ for each in METHODS)} can be "
                "exported, everything can be saved with save"
            )
    if not kinds:
        raise UnsupportedError(
            "the adapter changes no layer but its head, which is no adapter of peft; it can be saved with save"
        )
    if len(kinds) != 1:
        names = " and ".join(kind.__name__ for kind in kinds)
        raise UnsupportedError(f"an adapter of peft is one method, not {names}; attach and export them one by one")
    return METHODS[next(iter(kinds))]


def _by_module(model: nn.Module, adapter: AttachedAdapter) -> list[tuple[PeftModule, list[tuple[slice, nn.Module]]]]:
    """The changes of each module, as (rows of its weight, module of the adapter)."""
    _, modules = peft_modules(model)
    owners = {(m.tower, m.block, site): (m, layer.rows) for m in modules.values() for site, layer in m.layers.items()}
    changes: dict[str, tuple[PeftModule, list]] = {}
    for _, placement in adapter.placements:
        site = "fc2" if placement.site == "hidden" else placement.site
        owner, rows = owners[placement.tower, placement.block, site]
        owner.require()
        changes.setdefault(owner.path, (owner, []))[1].append((rows or slice(None), placement.module))
    return list(changes.values())


@dataclass(frozen=True)
class Biases:
    """Biases that are trained by themselves.

    Args:
        option: of peft, by which it trains them.
        names: in the model.
        tensors: by their names in the file of peft.
    """

    option: str
    names: frozenset[str]
    tensors: dict[str, torch.Tensor]


def _biases(model: nn.Module, adapter: AttachedAdapter, of_changed: str, changed: list[str]) -> Biases | None:
    """The biases trained by themselves, if they are those that peft trains with one of its options.

    Those of heads, which peft trains, too, are the adapter's if it has a head, and otherwise the model's own.
    """
    heads = tuple(f"{path}." for path in peft_modules(model)[0].heads)
    kept = tuple(f"{path}." for path in adapter.head_paths)
    trained, own = dict(adapter.trained_parameters()), dict(model.named_parameters())
    for option in ("all", of_changed):
        written = {name for name in trained_biases(model, option, changed) if not name.startswith(kept)}
        names = {name for name in written if not name.startswith(heads)}
        if names and names <= trained.keys():
            within = {f"{path}.bias": f"{path}.base_layer.bias" for path in changed}
            tensors = {within.get(name, name): trained.get(name, own[name]) for name in written}
            return Biases(option, frozenset(names), tensors)
    return None


def _modules_to_save(
    model: nn.Module, adapter: AttachedAdapter, biases: Biases | None
) -> dict[str, dict[str, torch.Tensor]]:
    """State of the modules that are trained whole, by name."""
    whole: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for path in adapter.head_paths:
        head = adapter.get_submodule(path)
        if type(head) is not nn.Linear:
            raise UnsupportedError(
                f"the head {path} is a {type(head).__name__}, but peft keeps the class of the backbone's; use a linear "
                "head, or head=False"
            )
        whole[path] |= head.state_dict()
    for name, parameter in adapter.trained_parameters():
        path, _, key = name.rpartition(".")
        whole[path][key] = parameter
    if biases is not None:
        alone = [path for path, state in whole.items() if state.keys() == {"bias"} and f"{path}.bias" in biases.names]
        whole = {path: state for path, state in whole.items() if path not in alone}
    for path, state in whole.items():
        missing = dict(model.get_submodule(path).named_parameters()).keys() - state.keys()
        if not path or (missing and path not in adapter.head_paths):
            raise UnsupportedError(
                f"peft trains whole modules, not {path or 'the model'}'s {', '.join(state)} alone; this adapter can be "
                "saved with save"
            )
        if also := [n for n, _ in model.named_modules() if n.endswith(path) and n != path and not n.startswith("peft")]:
            raise UnsupportedError(
                f"peft finds modules to save by the end of their names, and {path} would also be {also[0]}; this "
                "adapter can be saved with save"
            )
    return whole


def _write_new(folder: Path, files: dict[str, bytes]) -> None:
    """Make a folder with these files, complete or not at all."""
    target, partial = folder.absolute(), None
    try:
        if folder.exists() and any(folder.iterdir()):
            raise StorageError(f"{folder} is not empty; export into a new folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new name, so that what is deleted in the end is nothing that was there before.
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        partial.chmod(0o755)
        for name, content in files.items():
            with open(partial / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise StorageError(f"{folder} could not be written ({error.strerror}); nothing was changed") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
