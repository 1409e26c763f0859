"""Weights that torchao has quantised: they act as linear layers, but have no arithmetic of their own."""

import torch
import torch.nn as nn


def is_quantised(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds integers and scales instead of the numbers that it stands for."""
    # Plain tensors first: `torch.compile` can trace no more than this.
    return type(tensor) not in (torch.Tensor, nn.Parameter) and type(tensor).__module__.startswith("torchao.")


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers that a tensor stands for; of a plain tensor, the tensor itself."""
    return tensor.dequantize() if is_quantised(tensor) else tensor


def dequantise(module: nn.Module) -> nn.Module:
    """Put the numbers in the place of every quantised weight of a module."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and is_quantised(parameter):
                part._parameters[name] = nn.Parameter(full_precision(parameter.detach()), requires_grad=False)
    return module
