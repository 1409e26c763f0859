"""The mean loss, kept on the device it is on: nothing is read from there before an epoch is over."""

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanLoss(Metric):
    """sum_b n_b loss_b / sum_b n_b over batches b of n_b samples.

    `torchmetrics.MeanMetric` asks at each batch whether the value is a number and drops it if not; asked that, a GPU is
    waited for, and a mean without the batches that failed would look healthy. Here it is not a number either.
    """

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, samples: int) -> None:
        """Take in the mean loss of a batch of so many samples."""
        self.total += loss.to(self.total.dtype) * samples
        self.samples += samples

    def compute(self) -> Tensor:
        """The mean."""
        return self.total / self.samples
