"""The numbers of a run, as results.json has them."""

import lightning.pytorch as pl

from visionpeft.data import ImageDataModule
from visionpeft.runs.calibration import BINS
from visionpeft.runs.label_records import LabelsRecord, NumbersRecord
from visionpeft.runs.masks_record import MasksRecord
from visionpeft.runs.objects_record import ObjectsRecord
from visionpeft.runs.test_record import Record, TestRecord
from visionpeft.tasks import ImageTask


def record_of(task: ImageTask, datamodule: ImageDataModule, bins: int = BINS) -> Record:
    """What collects the test of a task on this data, with so many bins of the calibration error."""
    if task.objective.labels == "masks":
        return MasksRecord(task.class_names, datamodule.palette)
    if task.objective.labels == "objects":
        return ObjectsRecord(task.class_names, datamodule.palette)
    if task.objective.labels == "number":
        return NumbersRecord()
    if task.objective.labels == "several":
        return LabelsRecord(task.class_names, bins)
    return TestRecord(len(task.class_names), bins=bins)


def tested(trainer: pl.Trainer, record: Record) -> dict:
    """Entries of results.json on a test that has just run: its numbers under "test", and what and how many they are of.

    Of classes, `mean_per_class` is the mean over the classes that occur in the test of the share of each that was
    recognised (balanced accuracy). `macro_top1` is the mean that torchmetrics takes
    (`MulticlassAccuracy(average="macro")`): over the classes that occur or are predicted, of which one that is only
    predicted counts as 0. Of several labels, `map` and `f1` are means over the labels that occur, `macro_map` and
    `macro_f1` those of torchmetrics, in which one that does not occur counts as 0.
    """
    # Both, because of findings/torchmetrics_macro_accuracy_counts_absent_classes.sh
    numbers = {
        name.removeprefix("test/"): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("test/")
    }
    return {"test": numbers | record.numbers(), "tested_images": record.tested, **record.about()}


def batches(trainer: pl.Trainer, datamodule: ImageDataModule) -> dict[str, int]:
    """How many images a step of the optimiser has, and on how many devices."""
    accumulated = trainer.accumulate_grad_batches
    return {
        "devices": trainer.world_size,
        "batch_size": datamodule.batch_size,
        "accumulated": accumulated,
        "global_batch": trainer.world_size * datamodule.batch_size * accumulated,
    }


def setting(task: ImageTask, datamodule: ImageDataModule) -> dict:
    """What is trained on what."""
    return {**task.describe(), "data": datamodule.description(), "seed": task.seed}
