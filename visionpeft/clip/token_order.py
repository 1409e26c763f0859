"""A way around a copy of every frozen weight for each token, which PyTorch makes in bfloat16 on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn


@contextmanager
def attending_in_order(tower: nn.Module, images: torch.Tensor) -> Iterator[None]:
    """Within, the attentions of an image tower transpose their tokens into an order that PyTorch multiplies as one.

    `nn.MultiheadAttention` turns tokens (batch, tokens, width) into (tokens, batch, width) before its first product. Of
    a product of such a view with a frozen weight PyTorch (2.14.1) makes one for each token, and in bfloat16 on a CPU it
    copies the weight for each: a frozen ViT-B/16 takes eleven times as long. Tokens whose transpose is contiguous do
    not meet this. The values are the same but for rounding; nothing is done elsewhere, or while the tower is compiled.

    Args:
        tower: the image tower.
        images: what it will be given, in its dtype.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
    if images.device.type != "cpu" or dtype != torch.bfloat16 or torch.compiler.is_compiling():
        yield
        return
    # Adapted attentions are of a subclass, and do not transpose.
    attentions = [module for module in tower.modules() if type(module) is nn.MultiheadAttention and module.batch_first]
    hooks = [attention.register_forward_pre_hook(_in_order) for attention in attentions]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _in_order(attention: nn.MultiheadAttention, tokens: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The same queries, keys and values (batch, tokens, width), each stored token by token."""
    several = {id(x): x for x in tokens}  # of self-attention one, which is known by their being one object
    stored = {key: x.transpose(0, 1).contiguous().transpose(0, 1) for key, x in several.items()}
    return tuple(stored[id(x)] for x in tokens)
