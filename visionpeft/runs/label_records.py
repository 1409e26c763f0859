"""What the test split showed of several labels, or of numbers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelF1Score
from torchmetrics.functional import r2_score

from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.runs.calibration import BINS, Calibration
from visionpeft.runs.figures import draw_numbers, draw_reliability
from visionpeft.runs.test_record import Record


class LabelsRecord(Record):
    """Average precision and F1 of each of several labels, and their calibration.

    Args:
        class_names: of the labels.
    """

    def __init__(self, class_names: list[str], bins: int = BINS):
        self.class_names = class_names
        here = {"sync_on_compute": False}  # `take` puts together what several processes have
        self.precision = MultilabelAveragePrecision(len(class_names), average="none", thresholds=None, **here)
        self.f1 = MultilabelF1Score(len(class_names), average="none", **here)
        self.positives = torch.zeros(len(class_names), dtype=torch.long)
        self.calibration = Calibration("each label of each image, which came true where it applies", bins)

    def add(self, answers: Tensor, batch: Sequence, preprocessing: Preprocessing) -> None:
        """Add the probabilities of a batch."""
        probabilities, labels = answers.cpu(), batch[1].cpu().long()
        self.precision.update(probabilities, labels)
        self.f1.update(probabilities, labels)
        self.positives += labels.sum(dim=0)
        self.calibration.add(probabilities.flatten(), labels.flatten())

    def take(self, shares: Sequence["LabelsRecord"]) -> None:
        """Put together the shares of several processes."""
        for name in ("precision", "f1"):
            first, *others = (getattr(share, name) for share in shares)
            for other in others:
                first.merge_state(other)
            setattr(self, name, first)
        self.positives = sum(share.positives for share in shares)
        self.calibration.take([share.calibration for share in shares])

    def numbers(self) -> dict[str, float | None]:
        """Means over the labels that occur, None if there are none, and the calibration error."""
        occurs = self.positives > 0
        if not occurs.any():  # in the part of the test split that was asked for
            return {"map": None, "f1": None, "ece": self.calibration.error}
        return {
            "map": self.precision.compute()[occurs].mean().item(),
            "f1": self.f1.compute()[occurs].mean().item(),
            "ece": self.calibration.error,
        }

    def about(self) -> dict:
        """Over which labels the means are taken, the numbers of each, and the calibration."""
        rows = zip(self.class_names, self.positives.tolist(), self.precision.compute(), self.f1.compute(), strict=True)
        return {
            "labels_tested": {
                "occurring": int((self.positives > 0).sum()),
                "of": len(self.class_names),
                "map": "mean average precision over the labels that occur in the test",
                "f1": "mean F1 over the labels that occur in the test, found at a probability above one half",
                "macro_map": "torchmetrics' macro average: a label that does not occur counts as 0",
                "macro_f1": "torchmetrics' macro average: a label that does not occur counts as 0",
                "by_label": {
                    name: {
                        "images": images,
                        "average_precision": precision.item() if images else None,
                        "f1": f1.item() if images else None,
                    }
                    for name, images, precision, f1 in rows
                },
            },
            "calibration": self.calibration.describe(),
        }

    def draw(self, folder: Path, class_names: list[str]) -> None:
        """The reliability diagram."""
        draw_reliability(self.calibration, folder / "reliability.png")


class NumbersRecord(Record):
    """Predicted and true numbers."""

    def __init__(self):
        self.predicted: list[Tensor] = []
        self.true: list[Tensor] = []

    def add(self, answers: Tensor, batch: Sequence, preprocessing: Preprocessing) -> None:
        """Add the numbers of a batch."""
        self.predicted.append(answers.cpu().double())
        self.true.append(batch[1].cpu().double())

    def take(self, shares: Sequence["NumbersRecord"]) -> None:
        """Put together the shares of several processes."""
        self.predicted = [each for share in shares for each in share.predicted]
        self.true = [each for share in shares for each in share.true]

    def numbers(self) -> dict[str, float | None]:
        """R2 = 1 - sum (y - f)^2 / sum (y - mean y)^2; None of a single image, or if all labels are the same."""
        predicted, true = torch.cat(self.predicted), torch.cat(self.true)
        defined = len(true) > 1 and bool((true != true[0]).any())
        return {"r2": r2_score(predicted, true).item() if defined else None}

    def draw(self, folder: Path, class_names: list[str]) -> None:
        """Predicted against true numbers."""
        draw_numbers(torch.cat(self.true), torch.cat(self.predicted), folder / "predicted_numbers.png")
