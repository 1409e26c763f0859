"""Notices that the training loss is no number any more, without waiting for the device in every step."""

import torch
from torch import Tensor

from visionpeft.tasks.checkpointing import LOWER, DivergedError


class Divergence:
    """The first training loss that is not finite, kept on the device until it is asked for."""

    def __init__(self):
        self._first: tuple[Tensor, Tensor] | None = None  # step or -1, and its loss, both ()

    def note(self, loss: Tensor, step: int) -> None:
        """Take in the loss () of a step."""
        loss = loss.detach().float()
        if self._first is None or self._first[0].device != loss.device:
            self._first = torch.full_like(loss, -1, dtype=torch.long), torch.zeros_like(loss)
        at, value = self._first
        failed = (at < 0) & ~loss.isfinite()
        self._first = torch.where(failed, step, at), torch.where(failed, loss, value)

    def check(self, epoch: int) -> None:
        """Read from the device whether a loss so far was not finite.

        Raises:
            DivergedError: one was, in this epoch.
        """
        if self._first is None or (step := int(self._first[0])) < 0:
            return
        loss, self._first = self._first[1].item(), None
        raise DivergedError(f"the training loss became {loss} in epoch {epoch + 1}, step {step + 1}; {LOWER}")
