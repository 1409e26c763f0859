"""The numbers of a run, as results.json has them."""

import lightning.pytorch as pl

from visionpeft.data import ImageDataModule
from visionpeft.runs.test_record import TestRecord
from visionpeft.tasks import ImageTask


def test_numbers(trainer: pl.Trainer, record: TestRecord) -> dict[str, float]:
    """Loss and accuracies of a test that has just run."""
    numbers = {
        name.removeprefix("test/"): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("test/")
    }
    return numbers | {"mean_per_class": record.mean_per_class}


def setting(task: ImageTask, datamodule: ImageDataModule) -> dict:
    """What is trained on what."""
    return {**task.describe(), "data": datamodule.description(), "seed": task.seed}
