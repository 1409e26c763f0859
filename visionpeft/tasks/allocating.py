"""Methods that choose what they train by the data see it before the training: in one process, which chooses for all."""

import lightning.pytorch as pl
import torch

from visionpeft.adapters.allocate import allocate, remake
from visionpeft.adapters.storage import method_from
from visionpeft.errors import ConfigurationError
from visionpeft.methods.parts.base import describe_method
from visionpeft.tasks.averaging import copy_again


def allocate_alone(task: pl.LightningModule) -> None:
    """Show the methods of a task the training batches.

    Args:
        task: an `AdaptedTask`, whose trainer has the data.

    Raises:
        ConfigurationError: there is no data module.
    """
    datamodule = task.trainer.datamodule
    if datamodule is None:
        raise ConfigurationError(
            f"{task.label} chooses what it trains by the data; without a data module, call "
            "visionpeft.allocate(task.model, batches) before the training"
        )

    # What is drawn for the chosen places is a function of the seed, on any number of devices.
    with torch.random.fork_rng(devices=[]), task.uncompiled():
        torch.manual_seed(task.seed)
        allocate(task.model, task.shown(datamodule), task.loss_of_shown, task.adapter_name)
    copy_again(task.trainer.callbacks, task.trainer, task)


def allocate_together(task: pl.LightningModule) -> None:
    """Let the first of several processes choose for all, before Lightning wraps the model for them.

    A run that is resumed takes what its checkpoint says.
    """
    trainer = task.trainer
    if trainer.ckpt_path:
        described = torch.load(trainer.ckpt_path, map_location="cpu", weights_only=True)["methods"]
    else:
        if trainer.is_global_zero:
            task.to(trainer.strategy.root_device)
            allocate_alone(task)
        described = trainer.strategy.broadcast([describe_method(each) for each in task.adapter.methods])
    if task.adapter.pending:
        remake(task.model, task.adapter_name, [method_from(each) for each in described], {})
        copy_again(trainer.callbacks, trainer, task)
