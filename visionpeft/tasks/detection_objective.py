"""The objects of an image, as an objective of a task."""

from torch import Tensor
from torchmetrics import Metric

from visionpeft.tasks.objective import Objective, Shown


class ObjectsOfImage(Objective):
    """Boxes, and masks, of the objects of K classes: the losses of the head, added.

    Measured is COCO's average precision over a whole split, see `AveragePrecision`; not while training.

    Args:
        num_classes: K.
        masks: whether there are masks.
    """

    labels = "objects"
    loss_name = "of the head"
    rounded = "the corners of objects to whole pixels and more"

    def __init__(self, num_classes: int, masks: bool):
        self.outputs = num_classes
        self.masks = masks
        self.monitor = "mask_ap" if masks else "ap"
        self.shown = Shown(self.monitor, "mask AP" if masks else "AP", "average precision", percentage=True)

    def loss(self, logits: dict[str, Tensor], labels: list[dict]) -> Tensor:
        """The sum of the losses by name, each ()."""
        return sum(loss.float() for loss in logits.values())

    def measured_loss(self, logits: dict[str, Tensor], labels: list[dict]) -> Tensor:
        """The same; there are no weights."""
        return self.loss(logits, labels)

    def metrics(self, split: str) -> dict[str, Metric]:
        """None that is a mean over batches."""
        return {}

    def answers(self, logits: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """What was found in each image."""
        return logits

    def describe(self) -> dict:
        """For the record of a run, and for who uses what was trained."""
        return super().describe() | {"masks": self.masks}
