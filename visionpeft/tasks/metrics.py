"""The mean loss, kept on the device it is on: nothing is read from there before an epoch is over."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class MeanLoss(Metric):
    """sum_b n_b loss_b / sum_b n_b over batches b of n_b samples, or of so many pixels.

    `torchmetrics.MeanMetric` asks at each batch whether the value is a number and drops it if not; asked that, a GPU is
    waited for, and a mean without the batches that failed would look healthy. Here it is not a number either.
    """

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> nn.Module:
        """Go where the task goes, in single precision also where all else is put into half.

        bfloat16 counts to 256: what is added to a sum of so many losses is lost.
        """

        def moved(value: Tensor) -> Tensor:
            there = fn(value)
            return there if there.dtype == value.dtype else value.to(there.device)

        return super()._apply(moved, exclude_state)

    def update(self, loss: Tensor, samples: int | Tensor) -> None:
        """Take in the mean loss of a batch of so many samples, ()."""
        self.total += loss.to(self.total.dtype) * samples
        self.samples += samples

    def compute(self) -> Tensor:
        """The mean."""
        return self.total / self.samples
