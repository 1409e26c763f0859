"""A class for each pixel, as an objective of a task."""

import torch
from torch import Tensor
from torchmetrics import Metric

from visionpeft.data.segmentation.masks import IGNORED
from visionpeft.errors import DataError
from visionpeft.models.strips import cross_entropy
from visionpeft.tasks.objective import Objective, Shown, unknown_class
from visionpeft.tasks.pixel_metrics import MeanIoU, PixelAccuracy


class ClassOfPixels(Objective):
    """One class of K for each pixel: cross-entropy, mean over the labelled pixels of a batch.

    Measured are, over all labelled pixels of a split together, the mean of the same loss, the intersection over union
    of each class, averaged over the classes that are labelled or predicted ("miou", as by torchmetrics'
    `MulticlassJaccardIndex`; its `MeanIoU` takes means over images), and the share of pixels of the right class
    ("pixel_accuracy").

    Args:
        num_classes: K.
        scores: whether the head gives scores, of which each pixel's share is its probability, and has a loss of its
            own, which is then what is trained; measured is the cross-entropy of the shares.
    """

    labels = "masks"
    monitor = "miou"
    shown = Shown("miou", "mIoU", "mean IoU", percentage=True)

    def __init__(self, num_classes: int, scores: bool = False):
        self.outputs = num_classes
        self.scores = scores
        self.loss_name = "mask_classification" if scores else "cross_entropy"

    def read(self, labels: Tensor, images: int) -> Tensor:
        """Class indices int64 (batch, height, width).

        Raises:
            DataError: they are no such masks.
        """
        fits = isinstance(labels, Tensor) and labels.ndim == 3 and len(labels) == images
        if not fits or labels.is_floating_point() or (labels.dtype == torch.bool and self.outputs > 2):
            found = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise DataError(
                f"masks of a batch must be class indices, whole numbers ({images}, height, width), and these are "
                f"{found}; let the loader give them so"
            )
        labels = labels.long()  # of 8 bits, the cells of a table of all classes would overflow
        if (wrong := unknown_class(labels, self.outputs, lowest=IGNORED)) is not None:
            raise DataError(
                f"a mask of a batch has the class {wrong}, and the {self.outputs} classes are 0 to "
                f"{self.outputs - 1}, with {IGNORED} for pixels that do not count; let the loader give them so"
            )
        return labels

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of logits (batch, classes, h, w), resized to the labels (batch, height, width)."""
        return cross_entropy(logits, labels, IGNORED, scores=self.scores)[0]

    def loss_weight(self, labels: Tensor) -> Tensor | None:
        """The number of labelled pixels; None for a loss of masks, whose mean over devices is taken by images."""
        return None if self.scores else (labels != IGNORED).sum().float()

    def measured_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The same; there are no weights."""
        return self.loss(logits, labels)

    def metrics(self, split: str) -> dict[str, Metric]:
        """Mean IoU over the split, and pixel accuracy."""
        measured = None if split == "train" else split
        return {"miou": MeanIoU(self.outputs, IGNORED, measured), "pixel_accuracy": PixelAccuracy(IGNORED)}

    def answers(self, logits: Tensor) -> Tensor:
        """Class indices (batch, height, width), of logits (batch, classes, height, width) or of such indices."""
        return logits.argmax(1) if logits.ndim == 4 else logits.long()
