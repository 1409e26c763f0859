"""Heads of different numbers of classes in one batch: each computes row by row, and its rows are filled up."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import nn

from visionpeft.adapters.attached_adapter import AttachedAdapter, nest
from visionpeft.methods.parts.several_features import SeveralFeatures
from visionpeft.sites.stand_ins import in_own_precision

# How many values each row has within `filled_to`; None outside, where a head gives what it gives.
_WIDTH: ContextVar[int | None] = ContextVar("width", default=None)


@contextmanager
def filled_to(width: int) -> Iterator[None]:
    """Within the context, `OwnHead`s give rows of this many values, of which the first are theirs."""
    token = _WIDTH.set(width)
    try:
        yield
    finally:
        _WIDTH.reset(token)


class OwnHead(nn.Module):
    """The head of one adapter among others with other numbers of classes.

    Within `filled_to` it computes each row by itself. A product of one row and one of several are different kernels of
    a linear algebra library, and how many rows an adapter has in a batch must not show in its answers.

    Args:
        head: maps features (batch, width) to logits (batch, classes).
        classes: how many.
    """

    def __init__(self, head: nn.Module, classes: int):
        super().__init__()
        self.head = head
        self.classes = classes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map features (batch, width) to logits (batch, classes), filled up with zeros within `filled_to`."""
        width = _WIDTH.get()
        if width is None:
            return in_own_precision(self.head, x)
        if isinstance(self.head, SeveralFeatures):  # whose other features are those of the whole batch
            logits = self.head.by_row(x.to(self.head.weight.dtype)).to(x.dtype)
        else:
            logits = torch.cat([in_own_precision(self.head, row) for row in x.split(1)])
        return F.pad(logits, (0, width - self.classes))


def give_own_heads(adapter: AttachedAdapter) -> int | None:
    """Put `OwnHead`s in the place of the heads of an adapter that is not attached yet.

    Returns:
        How many classes they have; None without heads, or with one that changes no width.
    """
    widths = set()
    for path in adapter.head_paths:
        head = adapter.get_submodule(path)
        linear = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
        if linear:
            widths.add(linear[-1].out_features)
            *parents, name = path.split(".")
            del adapter.get_submodule(".".join(parents))._modules[name]
            nest(adapter, path, OwnHead(head, linear[-1].out_features))
    return max(widths, default=None)
