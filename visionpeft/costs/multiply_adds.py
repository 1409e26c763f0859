"""Multiply-adds of a forward pass."""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def giga_multiply_adds(model: nn.Module, images: torch.Tensor) -> float:
    """Giga multiply-adds of a forward in matrix products, attention and convolutions, as papers count them."""
    # The products inside fused attention are not counted everywhere, and those added in place nowhere.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _added_product})
    try:
        with sdpa_kernel(SDPBackend.MATH), counter:
            model(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return counter.get_total_flops() / 2e9


def _added_product(total: torch.Size, left: torch.Size, right: torch.Size, **options) -> int:
    """Operations of total += left @ right."""
    return 2 * left[0] * left[1] * right[1]
