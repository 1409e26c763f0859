"""What the test split showed, beyond its averages: a confusion matrix and the most confident mistakes."""

import heapq
from dataclasses import dataclass, field

import lightning.pytorch as pl
import torch
from torch import Tensor


@dataclass(order=True)
class Mistake:
    """A wrong prediction.

    Args:
        confidence: probability given to the wrong class.
        index: position in the test split.
        label: true class.
        prediction: predicted class.
        image: (3, height, width), values in [0, 1].
    """

    confidence: float
    index: int
    label: int = field(compare=False)
    prediction: int = field(compare=False)
    image: Tensor = field(compare=False, repr=False)


class TestRecord(pl.Callback):
    """Collect predictions while testing.

    Args:
        num_classes: number of classes.
        num_mistakes: how many of the most confident mistakes to keep.
    """

    __test__ = False  # for pytest

    def __init__(self, num_classes: int, num_mistakes: int = 24):
        self.num_mistakes = num_mistakes
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.long)  # rows are true classes
        self.mistakes: list[Mistake] = []
        self.seen = 0

    def on_test_batch_end(self, trainer, pl_module, outputs: Tensor, batch, batch_idx, dataloader_idx=0) -> None:
        """Add the logits (batch, classes) that `test_step` returned."""
        images, labels = batch[0], batch[1].cpu()
        confidences, predictions = (tensor.cpu() for tensor in outputs.float().softmax(dim=-1).max(dim=-1))
        num_classes = len(self.confusion)
        pairs = torch.bincount(labels * num_classes + predictions, minlength=num_classes**2)
        self.confusion += pairs.view(num_classes, num_classes)
        for row in (predictions != labels).nonzero().flatten().tolist():
            confidence = confidences[row].item()
            if len(self.mistakes) == self.num_mistakes and confidence <= self.mistakes[0].confidence:
                continue
            image = self._displayed(images[row], trainer.datamodule.preprocessing)
            # Each of several processes has every so many-th image.
            index = trainer.global_rank + trainer.world_size * (self.seen + row)
            mistake = Mistake(confidence, index, labels[row].item(), predictions[row].item(), image)
            push = heapq.heappush if len(self.mistakes) < self.num_mistakes else heapq.heapreplace
            push(self.mistakes, mistake)
        self.seen += len(labels)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put together what several processes have collected."""
        if trainer.world_size == 1:
            return
        records = [None] * trainer.world_size
        torch.distributed.all_gather_object(records, (self.confusion, self.mistakes, self.seen))
        self.confusion = sum(confusion for confusion, _, _ in records)
        self.mistakes = heapq.nlargest(self.num_mistakes, (each for _, mistakes, _ in records for each in mistakes))
        heapq.heapify(self.mistakes)
        self.seen = sum(seen for _, _, seen in records)

    @staticmethod
    def _displayed(image: Tensor, preprocessing) -> Tensor:
        if image.ndim >= 4:  # several views, of which the first is the image itself
            image = image[0]
        if image.ndim == 4:  # a clip (3, frames, height, width)
            image = image[:, image.shape[1] // 2]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        return (image.detach().float().cpu() * std + mean).clamp(0, 1)

    @property
    def mean_per_class(self) -> float:
        """Mean over the classes that occur of the share that was recognised."""
        support = self.confusion.sum(dim=1)
        present = support > 0
        return (self.confusion.diagonal()[present] / support[present]).mean().item()

    @property
    def macro_top1(self) -> float:
        """As `mean_per_class`, with 0 for each class that is predicted and does not occur."""
        support = self.confusion.sum(dim=1)
        seen = (support > 0) | (self.confusion.sum(dim=0) > 0)
        return (self.confusion.diagonal()[seen] / support[seen].clamp(min=1)).mean().item()

    @property
    def occurring(self) -> int:
        """Number of classes that occur."""
        return int((self.confusion.sum(dim=1) > 0).sum())
