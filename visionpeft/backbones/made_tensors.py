"""Tensors of a module that are made of others whenever they are read, or before each call."""

import inspect

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from visionpeft.backbones.quantised import is_quantised
from visionpeft.errors import UnsupportedError

# What the older tools of `torch.nn.utils` keep of a tensor that a hook makes before each call, and how it is undone.
KEPT = {
    "_orig": "torch.nn.utils.prune.remove, or torch.nn.utils.remove_spectral_norm",
    "_g": "torch.nn.utils.remove_weight_norm",
}


def made_of_others(module: nn.Module) -> tuple[str, str] | None:
    """Name of a tensor of this module that is made of others, and what writes it out; None if all are its own."""
    if is_parametrized(module):
        return next(iter(module.parametrizations)), "torch.nn.utils.parametrize.remove_parametrizations"
    return made_by_a_hook(module)


def made_by_a_hook(module: nn.Module) -> tuple[str, str] | None:
    """Likewise, of the tensors that a hook makes before each call, which cannot be copied and follow no `to`."""
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            for ending, undone in KEPT.items():
                if f"{name}{ending}" in module._parameters:
                    return name, undone
    return None


def check_own_tensors(model: nn.Module) -> None:
    """Refuse a model with tensors that hooks make or fetch: no copy of its blocks, by which they are checked, has them.

    Raises:
        UnsupportedError: naming the first of them.
    """
    for part, child in model.named_children():
        for path, module in child.named_modules(prefix=part) if part != "peft" else ():
            if made := made_by_a_hook(module):
                raise UnsupportedError(
                    f"{path}.{made[0]} is made by a hook before each call; write it out first, with {made[1]}"
                )
            if hasattr(module, "_hf_hook") and any(p is not None and p.is_meta for p in module._parameters.values()):
                raise UnsupportedError(
                    f"the tensors of {path} are fetched by a hook of accelerate before each call (cpu_offload, "
                    "device_map), and here they are read without one; load the model whole"
                )


def check_weights(model: nn.Module) -> None:
    """Refuse layers whose weight is none that can be read: those of `torch.ao.quantization`, which pack it and have no
    gradient, and those of other packages that quantise than torchao.

    Raises:
        UnsupportedError: naming the first of them.
    """
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and _is_coded(weight):
            raise UnsupportedError(
                f"{path} is a {type(module).__name__} of {type(module).__module__}, whose weight (a "
                f"{type(weight).__name__} of {str(weight.dtype).removeprefix('torch.')}) holds codes that only its own "
                "layer can read; quantise with torchao.quantization.quantize_, on whose weights adapters are trained"
            )
        if inspect.isfunction(getattr(type(module), "weight", None)):
            raise UnsupportedError(
                f"{path} is a {type(module).__name__} of torch.ao.quantization, which packs its weight and gives no "
                "gradient; adapt the model first, merge it (visionpeft.merge with keep=False) and then convert it, or "
                "quantise it with torchao.quantization.quantize_"
            )


def _is_coded(weight: torch.Tensor) -> bool:
    """Whether a weight is stored as something else than its numbers, and not by torchao: bitsandbytes, quanto."""
    wraps = hasattr(weight, "__tensor_flatten__") and not type(weight).__module__.startswith("torch.")
    numbers = weight.is_floating_point() or weight.is_complex()
    return not is_quantised(weight) and (wraps or not numbers)
