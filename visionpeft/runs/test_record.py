"""What the test split showed, beyond its averages: a confusion matrix and the most confident mistakes."""

import heapq
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.runs.calibration import BINS, Calibration
from visionpeft.runs.figures import draw_confusion, draw_mistakes, draw_reliability
from visionpeft.runs.mistake import Mistake


class Record(pl.Callback):
    """Base of what is collected while testing, from what the outputs of the model say.

    Attributes:
        tested: how many images, which a limit of the trainer may keep from being the whole split.
    """

    tested = 0

    def on_test_batch_end(self, trainer, pl_module, outputs: Tensor, batch, batch_idx, dataloader_idx=0) -> None:
        """Add the logits (batch, outputs) that `test_step` returned."""
        answers = pl_module.objective.answers(outputs.float())
        self.add(answers, batch, trainer.datamodule.preprocessing)
        self.tested += len(batch[0])
        unadapted = getattr(pl_module, "unadapted", None)
        if unadapted is not None:
            self.add_unadapted(pl_module.objective.answers(unadapted.float()), batch)

    def add_unadapted(self, answers: Tensor, batch: Sequence) -> None:
        """Add what a learner that adapts while testing would say of a batch if it did not."""

    @abstractmethod
    def add(self, answers: Tensor, batch: Sequence, preprocessing: Preprocessing) -> None:
        """Add a batch: what the outputs say, the batch itself, and how its images were prepared."""

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put together what several processes have collected."""
        if trainer.world_size > 1:
            shares = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, self)
            self.take(shares)
            self.tested = sum(share.tested for share in shares)

    def __getstate__(self) -> dict:
        """What was collected. Lightning gives callbacks methods of the task, and with them would go the backbone."""
        return {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}

    @abstractmethod
    def take(self, shares: Sequence["Record"]) -> None:
        """Put together the shares of several processes, this one's among them, in the order of their ranks."""

    @abstractmethod
    def numbers(self) -> dict[str, float | None]:
        """Numbers of the test, beside what the task has measured."""

    def about(self) -> dict:
        """Further entries of results.json, that say what the numbers are of."""
        return {}

    def draw(self, folder: Path, class_names: list[str]) -> None:
        """Figures into the folder of the run."""


class TestRecord(Record):
    """Collect the predictions of classes while testing.

    Args:
        num_classes: number of classes.
        num_mistakes: how many of the most confident mistakes to keep.
    """

    __test__ = False  # for pytest

    def __init__(self, num_classes: int, num_mistakes: int = 24, bins: int = BINS):
        self.num_mistakes = num_mistakes
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.long)  # rows are true classes
        self.mistakes: list[Mistake] = []
        self.seen = 0
        self.calibration = Calibration("the class found in each image, which came true where it is right", bins)
        self.unadapted = Calibration("the class found in each image without adapting to the test images", bins)

    def add_unadapted(self, answers: Tensor, batch: Sequence) -> None:
        """Add the class probabilities of a batch as they would be without adapting."""
        confidences, predictions = (tensor.cpu() for tensor in answers.max(dim=-1))
        self.unadapted.add(confidences, predictions == batch[1].cpu())

    def add(self, answers: Tensor, batch: Sequence, preprocessing: Preprocessing) -> None:
        """Add the class probabilities of a batch."""
        images, labels = batch[0], batch[1].cpu()
        confidences, predictions = (tensor.cpu() for tensor in answers.max(dim=-1))
        self.calibration.add(confidences, predictions == labels)
        num_classes = len(self.confusion)
        pairs = torch.bincount(labels * num_classes + predictions, minlength=num_classes**2)
        self.confusion += pairs.view(num_classes, num_classes)
        for row in (predictions != labels).nonzero().flatten().tolist():
            confidence = confidences[row].item()
            if len(self.mistakes) == self.num_mistakes and confidence <= self.mistakes[0].confidence:
                continue
            image = displayed(images[row], preprocessing)
            mistake = Mistake(confidence, self.seen + row, labels[row].item(), predictions[row].item(), image)
            push = heapq.heappush if len(self.mistakes) < self.num_mistakes else heapq.heapreplace
            push(self.mistakes, mistake)
        self.seen += len(labels)

    def take(self, shares: Sequence["TestRecord"]) -> None:
        """Put together the shares of several processes, of which each has every so many-th image."""
        self.confusion = sum(share.confusion for share in shares)
        mistakes = [
            replace(mistake, index=rank + len(shares) * mistake.index)
            for rank, share in enumerate(shares)
            for mistake in share.mistakes
        ]
        self.mistakes = heapq.nsmallest(self.num_mistakes, heapq.nlargest(self.num_mistakes, mistakes))
        self.seen = sum(share.seen for share in shares)
        self.calibration.take([share.calibration for share in shares])
        self.unadapted.take([share.unadapted for share in shares])

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

    def numbers(self) -> dict[str, float]:
        """Means over classes, the mean confidence and the calibration error."""
        return {
            "mean_per_class": self.mean_per_class,
            "macro_top1": self.macro_top1,
            "confidence": self.calibration.confidence,
            "ece": self.calibration.error,
        }

    def about(self) -> dict:
        """Over which classes the means are taken, and the calibration."""
        return {
            "classes_tested": {
                "occurring": self.occurring,
                "of": len(self.confusion),
                "mean_per_class": "mean recall over the classes that occur in the test (balanced accuracy)",
                "macro_top1": "torchmetrics' macro average: a class that is predicted and does not occur counts as 0",
            },
            "calibration": self.calibration.describe(),
            **({"without_adaptation": self._without()} if self.unadapted.counts.sum() else {}),
        }

    def _without(self) -> dict:
        """Accuracy, mean confidence and calibration error without adapting to the test images."""
        share = (self.unadapted.hits.sum() / self.unadapted.counts.sum()).item()
        return {"top1": share, "confidence": self.unadapted.confidence, "ece": self.unadapted.error}

    def draw(self, folder: Path, class_names: list[str]) -> None:
        """Confusion matrix, reliability diagram, and the most confident mistakes."""
        draw_confusion(self.confusion, class_names, folder / "confusion_matrix.png")
        draw_reliability(self.calibration, folder / "reliability.png")
        draw_mistakes(self.mistakes, class_names, folder / "wrong_predictions.png")


def displayed(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    """What a model was given, as a picture (3, height, width) from 0 to 1: of views the first, of a clip its middle."""
    if image.ndim >= 4:  # several views, of which the first is the image itself
        image = image[0]
    if image.ndim == 4:  # a clip (3, frames, height, width)
        image = image[:, image.shape[1] // 2]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (image.detach().float().cpu() * std + mean).clamp(0, 1)
