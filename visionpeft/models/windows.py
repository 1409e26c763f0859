"""Classes of every pixel of an image: of the whole at once, or of windows that slide over it."""

from collections.abc import Iterator
from typing import Protocol

import torch

from visionpeft.errors import ConfigurationError
from visionpeft.models.strips import classes_of

Size = tuple[int, int]


class Dense(Protocol):
    """What is asked of a model that gives logits at every pixel."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (batch, outputs, height, width)."""

    def coarse_logits(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (batch, outputs, rows, columns), which cover `1 / shares` of the image."""

    def shares(self, size: Size) -> tuple[float, float]:
        """Which part of the extent of `coarse_logits` an image of this size covers."""

    def decide(self, logits: torch.Tensor) -> torch.Tensor:
        """Class indices (batch, height, width) of logits (batch, outputs, height, width)."""


def predict_masks(
    model: Dense,
    images: torch.Tensor,
    *,
    window: int | None = None,
    stride: int | None = None,
    size: Size | None = None,
) -> torch.Tensor:
    """Class indices (batch, height, width) of the pixels of images.

    Args:
        model: the model, a `DensePredictor` or an `OpenVocabulary`.
        images: (batch, 3, height, width), as the backbone wants them.
        window: height and width of windows that slide over the images; None for the whole at once.
        stride: pixels from one window to the next; two thirds of the window when absent.
        size: height and width of the result, to which the logits are resized; by default those of the images.
    """
    with torch.no_grad():
        logits, shares = window_logits(model, images, window, stride)
        return classes_of(logits, tuple(images.shape[-2:]) if size is None else size, shares, model.decide)


def window_logits(
    model: Dense, images: torch.Tensor, window: int | None, stride: int | None
) -> tuple[torch.Tensor, tuple[float, float]]:
    """Logits (batch, classes, rows, columns), and the share of their extent that the images cover.

    Of the whole image they are at the resolution of the head. Of windows they have the size of the image; where windows
    overlap, their logits are averaged. The last window of each row and column ends with the image.
    """
    size = tuple(images.shape[-2:])
    if window is None:
        return model.coarse_logits(images), model.shares(size)
    check_windows(window, stride)
    total, count = None, images.new_zeros(1, 1, *size)
    for rows, columns in _windows(size, window, stride or max(1, 2 * window // 3)):
        part = model(images[:, :, rows, columns])
        total = part.new_zeros(*part.shape[:2], *size) if total is None else total
        total[:, :, rows, columns] += part
        count[:, :, rows, columns] += 1
    return total / count, (1.0, 1.0)


def check_windows(window: int | None, stride: int | None) -> None:
    """Refuse windows that do not cover the image.

    Raises:
        ConfigurationError: a window of no size, or a stride without a window, of 0, or longer than the window.
    """
    if window is not None and window < 1:
        raise ConfigurationError(f"window must be at least 1, not {window}")
    if stride is not None and (window is None or not 0 < stride <= window):
        raise ConfigurationError(f"stride {stride} must be from 1 to the window, which is {window}")


def _windows(size: Size, window: int, stride: int) -> Iterator[tuple[slice, slice]]:
    rows, columns = (_ranges(side, window, stride) for side in size)
    return ((row, column) for row in rows for column in columns)


def _ranges(side: int, window: int, stride: int) -> list[slice]:
    if side <= window:
        return [slice(0, side)]
    begins = [*range(0, side - window, stride), side - window]
    return [slice(begin, begin + window) for begin in begins]
