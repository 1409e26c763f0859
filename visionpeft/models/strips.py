"""Logits at the size of an image, a strip of rows at a time, so that they are never all there at once.

150 classes at 512 x 512 pixels are 150 MiB for each image, several times over in a loss. Resizing is linear in rows and
in columns, so a strip of the large logits is R X C^T with the strip's rows R of the one matrix and C the other. In the
backward pass each strip is computed again.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

STRIP_BYTES = 32 * 2**20


def interpolation(small: int, large: int, share: float = 1.0, device: torch.device | None = None) -> Tensor:
    """The matrix (large, small) of linear interpolation between the centres of pixels (`align_corners=False`).

    Value i of the large ones lies at c = (i + 1/2) small share / large - 1/2, not outside of the small ones, and takes
    max(0, 1 - |c - j|) of value j.

    Args:
        small: number of values.
        large: number of values to make of them.
        share: of the extent of the small ones that the large ones cover, from its beginning.
        device: where it is made.
    """
    # made where it is used: copied from the host, each step would wait for it
    exact = torch.float32 if device is not None and device.type == "mps" else torch.float64  # MPS has no double
    centres = (torch.arange(large, dtype=exact, device=device) + 0.5) * (small * share / large) - 0.5
    places = torch.arange(small, dtype=exact, device=device)
    return (1 - (centres.clamp(0, small - 1)[:, None] - places).abs()).clamp(min=0)


def resized(logits: Tensor, size: tuple[int, int], shares: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Logits (batch, classes, h, w) at another size (batch, classes, height, width), of a part of their extent."""
    with _in_full(logits):
        logits = _at_least_single(logits)
        rows, columns = _matrices(logits, size, shares)
        return rows @ logits @ columns.T


def largest(logits: Tensor) -> Tensor:
    """The classes (batch, height, width) with the largest logits (batch, classes, height, width)."""
    return logits.argmax(1)


def classes_of(
    logits: Tensor,
    size: tuple[int, int],
    shares: tuple[float, float] = (1.0, 1.0),
    decide: Callable[[Tensor], Tensor] = largest,
) -> Tensor:
    """The class with the largest resized logit at each pixel, (batch, height, width)."""
    with torch.no_grad(), _in_full(logits):
        logits = _at_least_single(logits)
        rows, columns = _matrices(logits, size, shares)
        strips = (rows[begin:end] @ logits @ columns.T for begin, end in _ranges(logits, *size))
        return torch.cat([decide(strip) for strip in strips], dim=1)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignored: int,
    shares: tuple[float, float] = (1.0, 1.0),
    *,
    scores: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the resized logits, mean over the labelled pixels of the batch, 0 if there are none.

    Args:
        logits: (batch, classes, h, w).
        labels: class indices (batch, height, width).
        ignored: the label of pixels that do not count.
        shares: of the extent of the logits that the labels cover.
        scores: whether they are no logits, but numbers whose share in those of all classes is the probability.

    Returns:
        The mean (), and the classes with the largest logits (batch, height, width).
    """
    height, width = labels.shape[-2:]
    with _in_full(logits):
        logits = _at_least_single(logits)
        rows, columns = _matrices(logits, (height, width), shares)
        total, found = logits.new_zeros(()), []
        for begin, end in _ranges(logits, height, width):
            part, classes = checkpoint(
                _of_strip, logits, rows[begin:end], columns, labels[:, begin:end], ignored, scores, use_reentrant=False
            )
            total = total + part
            found.append(classes)
    return total / (labels != ignored).sum().clamp(min=1), torch.cat(found, dim=1)


def _of_strip(
    logits: Tensor, rows: Tensor, columns: Tensor, labels: Tensor, ignored: int, scores: bool
) -> tuple[Tensor, Tensor]:
    strip = rows @ logits @ columns.T  # rows first, so that many strips cost no more products than one
    if scores:
        strip = strip.clamp(min=torch.finfo(strip.dtype).tiny).log()
    return F.cross_entropy(strip, labels, ignore_index=ignored, reduction="sum"), strip.detach().argmax(1)


def _in_full(logits: Tensor) -> torch.autocast:
    """Within the context products are computed in the precision of what is multiplied."""
    return torch.autocast(logits.device.type, enabled=False)


def _at_least_single(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _ranges(logits: Tensor, height: int, width: int) -> Iterator[tuple[int, int]]:
    row = logits.shape[0] * logits.shape[1] * width * logits.element_size()
    size = max(1, STRIP_BYTES // max(row, 1))
    return ((begin, min(begin + size, height)) for begin in range(0, height, size))


def _matrices(logits: Tensor, size: tuple[int, int], shares: tuple[float, float]) -> tuple[Tensor, Tensor]:
    sides = zip(logits.shape[-2:], size, shares, strict=True)
    rows, columns = (interpolation(small, large, share, logits.device).to(logits) for small, large, share in sides)
    return rows, columns
