"""What the attention inside windows of a map shares between families: shifting, cutting and putting together again."""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition, window_reverse

from visionpeft.backbones.attention import apply_fused, open_in_front
from visionpeft.sites import Sites, frozen_layers


def attend_in_windows(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a block of timm's Swin makes of what its attention reads: x (batch, rows, columns, width) to the same shape.

    The attention is called on (batch * windows, area, width), the windows of a sample one after another, and told the
    number of samples.
    """
    samples, rows, columns, width = x.shape
    shift, window = tuple(block.shift_size), tuple(block.window_size)
    if any(shift):
        x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
    x = F.pad(x, (0, 0, 0, -columns % window[1], 0, -rows % window[0]))
    padded = x.shape[1:3]
    mask = block.get_attn_mask(x) if block.dynamic_mask else block.attn_mask
    windows = window_partition(x, window).view(-1, block.window_area, width)
    windows = block.attn(windows, mask=mask, samples=samples)
    x = window_reverse(windows.view(-1, *window, width), window, *padded)
    x = x[:, :rows, :columns, :].contiguous()
    return torch.roll(x, shifts=shift, dims=(1, 2)) if any(shift) else x


def window_heads(
    attention: nn.Module,
    x: torch.Tensor,
    sites: Sites,
    samples: int,
    layer: Callable[[torch.Tensor], torch.Tensor] | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """q, k and v (windows, heads, tokens or keys, head width) of windows x (windows, area, width).

    Layers see the windows of a sample together, as (samples, tokens, width). The keys of prompts come first in every
    window.

    Args:
        attention: with `qkv` and `num_heads`.
        x: the windows.
        sites: with what acts at q, k and v.
        samples: how many samples they are of.
        layer: the fused projection, or None if it is x W^T + b and need not be called.
        bias: its bias, or None.
    """
    together = x.reshape(samples, -1, x.shape[-1])
    prompts = sites.prompts(together)
    weight = attention.qkv.weight

    def split(y: torch.Tensor, tokens: int) -> torch.Tensor:
        return y.reshape(-1, tokens, attention.num_heads, y.shape[-1] // attention.num_heads).transpose(1, 2)

    q, k, v = (split(y, x.shape[1]) for y in apply_fused(sites, together, layer, weight, bias))
    if prompts is not None:
        hooked = isinstance(layer, nn.Module) and frozen_layers.is_hooked(layer)
        _, *others = apply_fused(sites, prompts, layer.forward if hooked else layer, weight, bias)
        others = (_in_every_window(split(other, prompts.shape[1]), len(x)) for other in others)
        k, v = (torch.cat((other, own), dim=2) for other, own in zip(others, (k, v), strict=True))
    return q, k, v


def _in_every_window(x: torch.Tensor, windows: int) -> torch.Tensor:
    """(1 or samples, heads, keys, head width) for the windows of the samples, one sample after another."""
    return x.expand(windows, -1, -1, -1) if len(x) == 1 else x.repeat_interleave(windows // len(x), dim=0)


def project_windows(attention: nn.Module, x: torch.Tensor, sites: Sites, samples: int) -> torch.Tensor:
    """The output projection (windows, area, width) of heads x (windows, heads, area, head width) of so many samples."""
    x = x.transpose(1, 2).flatten(2)
    y = sites.call(attention.proj, x.view(samples, -1, x.shape[-1]))
    return y.view(*x.shape[:2], y.shape[-1])


def add_positions(scores: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Scores (batch * windows, heads, area, keys) with the bias (1, heads, area, area) of relative positions and the
    mask (windows, area, area) of a shifted map; keys that are no pixels come first and get neither.
    """
    area, keys = scores.shape[-2:]
    scores = scores + open_in_front(bias, False, area, keys, scores)[0]
    if mask is None:
        return scores
    mask, _ = open_in_front(mask, False, area, keys, scores)
    split = scores.view(-1, len(mask), *scores.shape[1:]) + mask.unsqueeze(1).unsqueeze(0)
    return split.view(scores.shape)


class SmallMap:
    """Makes the input by which the self-check tries a block with windows: a map of no more than two windows a side.

    It sets the size on the block, which is the copy that is tried. Whether windows are shifted, and whether the map is
    padded, stays as it is.

    Args:
        block: the block.
        width: its width.
    """

    def __init__(self, block: nn.Module, width: int):
        self.block = block
        self.width = width

    def __call__(self, num_tokens: int) -> dict:
        """The map (2, rows, columns, width)."""
        block = self.block
        size = []
        for side, window in zip(block.input_resolution, block.window_size, strict=True):
            size.append(min(side, 2 * window - (1 if side % window else 0)))
        block.set_input_size(tuple(size), tuple(block.window_size))
        return {"x": torch.randn(2, *size, self.width, dtype=torch.float64)}
