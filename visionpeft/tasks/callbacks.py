"""Callbacks of Lightning's that a task must know of: refused where they cannot work, helped where they can."""

from collections.abc import Iterable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
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


def check_callbacks(callbacks: Iterable[pl.Callback], task: pl.LightningModule) -> None:
    """Refuse callbacks that would give something else than they promise.

    Args:
        callbacks: those of the trainer.
        task: what is trained.

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
        if isinstance(callback, BackboneFinetuning):
            raise ConfigurationError(
                f"{name} lets the backbone train from some epoch on, and it stays frozen here; leave it out, and name "
                "what is to be trained as well with --model.train"
            )
        if isinstance(callback, FINDERS) and not task.trained_parameters():
            raise ConfigurationError(f"{name} has nothing to search for: {task.label} trains nothing by gradient steps")
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
    if not isinstance(callback, StochasticWeightAveraging):
        return
    trained = task.trained_keys()
    own = {id(tensor) for key, tensor in task.state_dict(keep_vars=True).items() if key in trained}
    for path, module in task.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or id(module.running_mean) in own:
            continue
        if (module.running_mean != 0).any() or (module.running_var != 1).any():  # as it is taken anew, it would change
            raise ConfigurationError(
                f"{name} takes the statistics of every batch normalisation anew, and {path} is frozen; use "
                "EMAWeightAveraging, which does not"
            )


def check_resuming(callbacks: Iterable[pl.Callback]) -> None:
    """Refuse callbacks with which a training would begin anew from a checkpoint's weights.

    Raises:
        ConfigurationError: one searches before training, and puts what it has saved itself in the checkpoint's place.
    """
    for callback in callbacks:
        if isinstance(callback, FINDERS):
            raise ConfigurationError(
                f"with {type(callback).__name__} Lightning forgets the checkpoint to resume from; leave it out, and "
                "give what it has found"
            )


def finish_training(trainer: pl.Trainer, task: pl.LightningModule) -> None:
    """Leave the averaged weights and the number of epochs of a training that had finished, as Lightning does not."""
    _finish_averaging(trainer, task)
    progress = trainer.fit_loop.epoch_progress.current
    progress.completed = progress.started  # one that was cut short, too


def _finish_averaging(trainer: pl.Trainer, task: pl.LightningModule) -> None:
    for callback in averaging_callbacks(trainer.callbacks):
        if isinstance(callback, WeightAveraging):
            callback.on_train_end(trainer, task)
        elif trainer.current_epoch > callback.swa_end:
            callback.transfer_weights(callback._average_model, task)


def stop_as_before(trainer: pl.Trainer) -> None:
    """Do not go on with a training that early stopping had ended."""
    if any(each.wait_count >= max(1, each.patience) for each in trainer.early_stopping_callbacks):
        trainer.should_stop = True


def _names(callbacks: list[pl.Callback]) -> str:
    return " and ".join(type(callback).__name__ for callback in callbacks)
