"""The numbers of a run, as results.json has them."""

import lightning.pytorch as pl

from visionpeft.data import ImageDataModule
from visionpeft.methods.base import describe_method
from visionpeft.reports.test_record import TestRecord
from visionpeft.tasks import ImageClassification


def test_numbers(trainer: pl.Trainer, record: TestRecord) -> dict[str, float]:
    """Loss and accuracies of a test that has just run."""
    numbers = {
        name.removeprefix("test/"): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("test/")
    }
    return numbers | {"mean_per_class": record.mean_per_class}


def setting(task: ImageClassification, datamodule: ImageDataModule) -> dict:
    """What is trained on what."""
    return {
        "method": [describe_method(method) for method in task.methods],
        "backbone": task.model.backbone_source,
        "parameters": parameter_counts(task),
        "data": datamodule.description(),
        "seed": task.seed,
    }


def parameter_counts(task: ImageClassification) -> dict[str, float]:
    """Trained values, those of them outside the head, all values of the adapted model, and the trained share."""
    total = sum(parameter.numel() for parameter in task.model.parameters())
    trainable = sum(parameter.numel() for parameter in task.model.parameters() if parameter.requires_grad)
    return {
        "trainable": trainable,
        "adapter": task.adapter.num_parameters(),
        "total": total,
        "share": trainable / total,
    }
