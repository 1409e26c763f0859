"""What is measured of pixels, counted on the device they are on.

torchmetrics leaves ignored pixels out by indexing, whose result has a size that only the device knows, so that each
training step waits for it. Here they are counted with a weight of zero.
"""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassJaccardIndex


class MeanIoU(MulticlassJaccardIndex):
    """Mean over classes of TP / (TP + FP + FN) of all pixels together; classes neither labelled nor found do not count.

    Args:
        num_classes: K.
        ignored: the label of pixels that do not count.
    """

    def __init__(self, num_classes: int, ignored: int):
        super().__init__(num_classes, average="macro", ignore_index=ignored, validate_args=False)

    def update(self, found: Tensor, labels: Tensor) -> None:
        """Take in the classes found, and the labels, both (batch, height, width)."""
        counts = labels != self.ignore_index
        cells = torch.where(counts, labels * self.num_classes + found, 0).flatten()
        added = torch.zeros_like(self.confmat).flatten().scatter_add_(0, cells, counts.flatten().to(self.confmat.dtype))
        self.confmat = self.confmat + added.view_as(self.confmat)


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
