"""What can be known to fail before hours of training are spent on it."""

from collections.abc import Mapping

from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from visionpeft.data import ImageDataModule
from visionpeft.data.records import size_of
from visionpeft.errors import ConfigurationError
from visionpeft.tasks import ImageTask
from visionpeft.tasks.callbacks import check_callbacks

# How data sets that have no split of their own for selection, or for the test, get one.
OPTIONS = {
    "val": {
        "ImageFolder": "a folder val/, or --data.val_fraction 0.1 where the folder has no splits",
        "VideoFolder": "a folder val/, or --data.val_fraction 0.1 where the folder has no splits",
        "ImageList": "--data.val val.csv",
        "StreamedImages": "--data.val with the name of one",
        "VideoList": "--data.val val.csv",
        "VTAB-1k": "--data.train_on train800",
    },
    "test": {
        "ImageFolder": "a folder test/, or --data.test_fraction 0.2 where the folder has no splits",
        "VideoFolder": "a folder test/, or --data.test_fraction 0.2 where the folder has no splits",
        "ImageList": "--data.test test.csv",
        "StreamedImages": "--data.test with the name of one",
        "VideoList": "--data.test test.csv",
    },
}


def check_before_training(
    task: ImageTask, datamodule: ImageDataModule, trainer: Mapping, report: str, tests: bool, processes: int = 1
) -> None:
    """Refuse a run that would stop after its last epoch, before it has a run directory.

    Args:
        task: what is trained.
        datamodule: its data, set up.
        trainer: options of the trainer, as given; its callbacks are built.
        report: "last", "best" or "best_test".
        tests: whether a test follows.
        processes: how many train together.

    Raises:
        ConfigurationError: a split is missing, or an option leaves nothing to select on or to test; or the backbone
            does not take the images, or the precision not the labels.
    """
    sources, dataset = datamodule.sources, str(datamodule.description().get("dataset"))
    if "train" not in sources and task.trained_parameters():
        raise ConfigurationError(
            f"{dataset} has only {' and '.join(sources)} images and none to train on; give the data to train on, and "
            "score these with python -m visionpeft.evaluate"
        )
    if report == "best" and "val" not in sources:
        raise ConfigurationError(
            f"--report best needs a validation split, and {dataset} has none here: give {_get('val', dataset)}, or use "
            "--report last"
        )
    if tests and "test" not in sources:
        raise ConfigurationError(
            f"{dataset} has no test split here: give {_get('test', dataset)}, or use --test false to train without a "
            "test"
        )
    if report != "last":
        _check_selection(trainer, report)
        if task.trained_parameters() and (mean := task.reports_mean()):
            raise ConfigurationError(
                f"--report {report} would keep the values of one epoch, and {mean}, or use --report last"
            )
    _check_end(trainer, task)
    if "val" in sources and task.trained_parameters():
        _check_interval(trainer, datamodule, processes)
    _check_callbacks(trainer, task)
    task.objective.check_precision(trainer.get("precision"))
    if processes > 1 and not task.trained_parameters():
        raise ConfigurationError(
            f"{task.label} trains nothing by gradient steps, so {processes} devices have nothing to share; use one "
            "(--trainer.devices 1)"
        )
    for split in ("train", *(["val"] if "val" in sources else []), *(["test"] if tests else [])):
        share = datamodule.batch_size if split == "train" and datamodule.drop_last else 1
        size = size_of(sources.get(split, ()))
        if size is not None and size < processes * share and processes > 1:
            raise ConfigurationError(
                f"{size} {split} images cannot be shared by {processes} devices"
                + (f" in whole batches of {share}" if share > 1 else "")
                + "; use fewer devices (--trainer.devices)"
            )
    task.check_before_training(datamodule, processes)


def _check_end(trainer: Mapping, task: ImageTask) -> None:
    """Refuse a training without an end, to which no learning rate could fall."""
    epochs, steps = (trainer.get(option) for option in ("max_epochs", "max_steps"))
    if task.trained_parameters() and epochs is not None and epochs < 0 and (steps is None or steps < 0):
        raise ConfigurationError(
            f"--trainer.max_epochs {epochs} has no end, and the learning rate falls until then; give the number of "
            "epochs, or of steps as --trainer.max_steps"
        )


def _check_interval(trainer: Mapping, datamodule: ImageDataModule, processes: int) -> None:
    """Refuse intervals of validation that are none, or that no epoch comes to the end of, as Lightning does later."""
    interval, every = trainer.get("val_check_interval"), trainer.get("check_val_every_n_epoch")
    for option, value in (("val_check_interval", interval), ("check_val_every_n_epoch", every)):
        if isinstance(value, int | float) and value <= 0:
            raise ConfigurationError(
                f"--trainer.{option} {value} is no interval of validation; leave it out to validate after each epoch, "
                "or use --trainer.limit_val_batches 0 and --report last to train without"
            )
    if isinstance(interval, int) and every is not None and trainer.get("limit_val_batches") != 0:
        batches = len(datamodule.train_loader(processes))
        limit = trainer.get("overfit_batches") or trainer.get("limit_train_batches")
        if limit is not None:
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        if interval > batches:
            raise ConfigurationError(
                f"--trainer.val_check_interval {interval} is more than the {batches} batches of an epoch; give fewer, "
                "or --trainer.check_val_every_n_epoch null to count on from epoch to epoch"
            )


def _check_callbacks(trainer: Mapping, task: ImageTask) -> None:
    """Refuse callbacks that cannot work, and those that change what the configuration of the run says."""
    given = trainer.get("callbacks") or []
    callbacks = given if isinstance(given, list) else [given]
    options = {LearningRateFinder: "--model.optimisation.lr", BatchSizeFinder: "--data.batch_size"}
    for callback in callbacks:
        for kind, option in options.items():
            if isinstance(callback, kind):
                raise ConfigurationError(
                    f"{type(callback).__name__} would train with another value than the configuration of the run says; "
                    f"find it before with Lightning's Tuner, and give it as {option}"
                )
    check_callbacks(callbacks, task)


def _get(split: str, dataset: str) -> str:
    return OPTIONS[split].get(dataset, f"data with a {split} split")


def _check_selection(trainer: Mapping, report: str) -> None:
    """Refuse options with which no epoch is validated."""
    if (reason := unvalidated(trainer)) is not None:
        raise ConfigurationError(f"{reason} leaves no epoch that --report {report} could choose; use --report last")


def check_judged(trainer: Mapping, what: str) -> None:
    """Refuse options with which a training that is judged on validation would never be validated.

    Raises:
        ConfigurationError: so it is.
    """
    if (reason := unvalidated(trainer)) is not None:
        raise ConfigurationError(f"{reason} leaves no epoch validated, by which {what} is judged; leave it out")


def unvalidated(trainer: Mapping) -> str | None:
    """The option of the trainer with which no epoch is validated; None where one is."""
    epochs, every = trainer.get("max_epochs"), trainer.get("check_val_every_n_epoch") or 1
    limit = trainer.get("limit_val_batches")
    if epochs == 0:
        return "--trainer.max_epochs 0"
    if epochs is not None and 0 < epochs < every:
        return f"--trainer.check_val_every_n_epoch {every} with {epochs} epochs"
    if limit is not None and limit == 0:
        return "--trainer.limit_val_batches 0"
    return "--trainer.fast_dev_run" if trainer.get("fast_dev_run") else None
