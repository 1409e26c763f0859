"""What is measured of pixels, counted on the device they are on.

torchmetrics leaves ignored pixels out by indexing, whose result has a size that only the device knows, so that each
training step waits for it. Here they are counted with a weight of zero.
"""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassJaccardIndex

from visionpeft.errors import DataError


class MeanIoU(MulticlassJaccardIndex):
    """Mean over classes of TP / (TP + FP + FN) of all pixels together; classes neither labelled nor found do not count.

    Args:
        num_classes: K.
        ignored: the label of pixels that do not count.
        measured: the split that is measured; None while training, whose batches may have nothing that counts.
    """

    def __init__(self, num_classes: int, ignored: int, measured: str | None = None):
        super().__init__(num_classes, average="macro", ignore_index=ignored, validate_args=False)
        self.measured = measured

    def update(self, found: Tensor, labels: Tensor) -> None:
        """Take in the classes found, and the labels, both (batch, height, width)."""
        counts = labels != self.ignore_index
        cells = torch.where(counts, labels * self.num_classes + found, 0).flatten()
        added = torch.zeros_like(self.confmat).flatten().scatter_add_(0, cells, counts.flatten().to(self.confmat.dtype))
        self.confmat = self.confmat + added.view_as(self.confmat)

    def compute(self) -> Tensor:
        """The mean; not a number where no pixel counts.

        Raises:
            DataError: of a split that is measured, no pixel counts.
        """
        if self.measured is not None and not self.confmat.any():
            raise DataError(
                f"no pixel measured of the {self.measured} split has a class, all are ignored, so that nothing can be "
                "measured; take other images, or see what the values of their masks mean (values, ignore)"
            )
        return super().compute()


class PixelAccuracy(Metric):
    """Share of the labelled pixels of all batches whose class was found; 0 if there are none.

    Args:
        ignored: the label of pixels that do not count.
    """

    full_state_update = False

    def __init__(self, ignored: int):
        super().__init__()
        self.ignored = ignored
        self.add_state("hits", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("pixels", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, found: Tensor, labels: Tensor) -> None:
        """Take in the classes found, and the labels, both (batch, height, width)."""
        counts = labels != self.ignored
        self.hits += ((found == labels) & counts).sum()
        self.pixels += counts.sum()

    def compute(self) -> Tensor:
        """The share."""
        return self.hits / self.pixels.clamp(min=1)
