"""Load a local file of weights into a timm model, naming what does not fit."""

import pickle
import sys
import zipfile
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from visionpeft.errors import StorageError, one_line

# Where training scripts put the weights inside a checkpoint, and tensors of theirs that no classifier has.
_NESTED = ("state_dict", "model", "model_state", "teacher", "module")
_NOT_OF_THE_BACKBONE = ("head.", "head_dist.", "fc.", "pre_logits.", "decoder", "mask_token")


def load_timm_checkpoint(model: nn.Module, path: Path) -> None:
    """Load `.safetensors`, `.pth`/`.pt`/`.bin` or `.npz` into a timm model.

    Tensors of a classification head are left out when they do not fit the model's head. Everything else must match.

    Raises:
        StorageError: the file is damaged, holds more than tensors, or has missing, unexpected or misshapen tensors.
    """
    if path.suffix == ".npz":
        _load_npz(model, path)
        return
    state = _read(path)
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # timm's key conversion
    if filter_fn is not None:
        try:
            state = filter_fn(state, model)
        except Exception as error:  # timm resizes positions and the like, and fails on sizes it does not expect
            raise StorageError(
                f"{path} does not fit {type(model).__name__}: its tensors, such as position embeddings, cannot be "
                f"converted to {getattr(model, 'num_prefix_tokens', 'these')} prefix tokens and this patch grid "
                f"({one_line(error)})"
            ) from error
    own = model.state_dict()
    head = _head_prefixes(model)
    misfits = [key for key in state if key.startswith(head) and (key not in own or own[key].shape != state[key].shape)]
    state = {key: value for key, value in state.items() if key not in misfits}

    missing = [key for key in own if key not in state and not key.startswith(head)]
    unexpected = [key for key in state if key not in own and not key.startswith(_NOT_OF_THE_BACKBONE)]
    shapes = [
        f"{key} is {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        *([f"missing {_some(missing)}"] if missing else []),
        *([f"unexpected {_some(unexpected)}"] if unexpected else []),
        *([_some(shapes)] if shapes else []),
    ]
    if problems:
        raise StorageError(f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise StorageError(
            f"{path} is damaged or holds Python objects besides tensors; only tensors are read (save its state_dict "
            "as safetensors)"
        ) from error
    except (safetensors.SafetensorError, RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise StorageError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
    while isinstance(state, dict) and (nested := next((key for key in _NESTED if key in state), None)):
        state = state[nested]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise StorageError(f"{path} does not hold a state dict of tensors")
    prefix = "module."  # left by DataParallel
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _load_npz(model: nn.Module, path: Path) -> None:
    if not hasattr(model, "load_pretrained"):
        raise StorageError(f"{type(model).__name__} cannot read .npz files; only timm's VisionTransformer can")
    try:
        model.load_pretrained(str(path))
    except KeyError as error:
        raise StorageError(f"{path} is not a ViT of this size: {error.args[0]}") from error
    except Exception as error:
        raise StorageError(f"{path} does not fit {type(model).__name__}: {str(error).splitlines()[0]}") from error


def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of the head's tensors; a distilled DeiT has two heads."""
    classifiers = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    return tuple(f"{classifier}." for classifier in classifiers)


def _some(items: list[str]) -> str:
    shown = ", ".join(items[:4])
    return shown if len(items) <= 4 else f"{shown} and {len(items) - 4} more"
