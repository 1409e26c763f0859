"""Gradients through the text tower, of learners that compute them themselves."""

from collections.abc import Sequence

import torch

from visionpeft.clip.text import TextEncoder


def gradients_of(
    text: TextEncoder,
    output: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    upstream: torch.Tensor | None = None,
    keep_graph: bool = False,
) -> list[torch.Tensor]:
    """Gradients of `output`, with `upstream` as the gradient of what follows it, with respect to `tensors`.

    They are scaled on their way through a text tower in float16, where small gradients would become zero.
    """
    device = text.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    scale = 1024.0 if torch.float16 in (autocast, text.dtype) else 1.0
    upstream = torch.ones_like(output) if upstream is None else upstream
    found = torch.autograd.grad(output, tensors, upstream * scale, retain_graph=keep_graph)
    return [gradient / scale for gradient in found]
