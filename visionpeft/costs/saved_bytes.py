"""Bytes that autograd keeps for the backward pass."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def storages(module: nn.Module) -> set[int]:
    """Where the parameters and buffers of a module lie."""
    return {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}


def saved_bytes(step: Callable[[], Tensor], frozen: set[int]) -> tuple[int, Tensor]:
    """Most bytes of distinct storages kept for backward during a step, and the step's result.

    Args:
        step: computes something with gradients.
        frozen: storages that are there anyway, such as those of the parameters.
    """
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that holds itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = step()
    return sum(seen.values()), result
