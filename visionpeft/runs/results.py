"""The numbers of a run, as results.json has them."""

import lightning.pytorch as pl

from visionpeft.data import ImageDataModule
from visionpeft.runs.test_record import TestRecord
from visionpeft.tasks import ImageTask


def test_numbers(trainer: pl.Trainer, record: TestRecord) -> dict[str, float]:
    """Loss and accuracies of a test that has just run.

    `mean_per_class` is the mean over the classes that occur in the test of the share of each that was recognised
    (balanced accuracy). `macro_top1` is the mean that torchmetrics takes (`MulticlassAccuracy(average="macro")`): over
    the classes that occur or are predicted, of which one that is only predicted counts as 0.
    """
    # Both, because of findings/torchmetrics_macro_accuracy_counts_absent_classes.sh
    numbers = {
        name.removeprefix("test/"): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("test/")
    }
    return numbers | {"mean_per_class": record.mean_per_class, "macro_top1": record.macro_top1}


def classes_tested(record: TestRecord) -> dict[str, int | str]:
    """Over which classes the means of a test are taken."""
    return {
        "occurring": record.occurring,
        "of": len(record.confusion),
        "mean_per_class": "mean recall over the classes that occur in the test (balanced accuracy)",
        "macro_top1": "torchmetrics' macro average: a class that is predicted and does not occur counts as 0",
    }


def setting(task: ImageTask, datamodule: ImageDataModule) -> dict:
    """What is trained on what."""
    return {**task.describe(), "data": datamodule.description(), "seed": task.seed}
