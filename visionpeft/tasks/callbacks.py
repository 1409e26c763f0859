"""Callbacks of Lightning's that a task must know of: refused where they cannot work, helped where they can."""

from collections.abc import Iterable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn

from visionpeft.errors import ConfigurationError
from visionpeft.tasks.averaging import averaging_callbacks

FINDERS = BatchSizeFinder | LearningRateFinder


def check_callbacks(callbacks: Iterable[pl.Callback], task: pl.LightningModule, resumed: bool = False) -> None:
    """Refuse callbacks that would give something else than they promise.

    Args:
        callbacks: those of the trainer.
        task: what is trained.
        resumed: whether the training goes on from a checkpoint.

    Raises:
        ConfigurationError: one cannot work with what is trained.
    """
    callbacks = list(callbacks)
    averaging = averaging_callbacks(callbacks)
    if len(averaging) > 1:
        raise ConfigurationError(f"{_names(averaging)} would both average the weights; keep one of them")
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, ModelPruning):
            raise ConfigurationError(
                f"{name} replaces the backbone's weights by others under other names, and they are not to change here; "
                "leave it out"
            )
        if isinstance(callback, FINDERS) and resumed:
            raise ConfigurationError(
                f"with {name} Lightning forgets the checkpoint to resume from; leave it out, and give what it has found"
            )
        if isinstance(callback, GradientAccumulationScheduler) and task.optimisation.scale_lr_by_batch:
            raise ConfigurationError(
                f"scale_lr_by_batch needs one number of samples per step, which {name} changes; set it to null"
            )
    for callback in averaging:
        _check_averaging(callback, task)


def _check_averaging(callback: WeightAveraging | StochasticWeightAveraging, task: pl.LightningModule) -> None:
    name = type(callback).__name__
    if reason := task.not_averaged():
        raise ConfigurationError(f"{name} does not go with this run: {reason}; or leave the callback out")
    trained = task.trained_keys()
    if not isinstance(callback, StochasticWeightAveraging):
        return
    for path, module in task.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{path}.running_mean" not in trained:
            raise ConfigurationError(
                f"{name} takes the statistics of every batch normalisation anew, and {path} is frozen; use "
                "EMAWeightAveraging, which does not"
            )


def finish_averaging(trainer: pl.Trainer, task: pl.LightningModule) -> None:
    """Leave the averaged weights in a task whose training had finished, when Lightning does not."""
    for callback in averaging_callbacks(trainer.callbacks):
        callback.on_train_end(trainer, task)


def stop_as_before(trainer: pl.Trainer) -> None:
    """Do not go on with a training that early stopping had ended."""
    if any(each.wait_count >= max(1, each.patience) for each in trainer.early_stopping_callbacks):
        trainer.should_stop = True


def _names(callbacks: list[pl.Callback]) -> str:
    return " and ".join(type(callback).__name__ for callback in callbacks)
