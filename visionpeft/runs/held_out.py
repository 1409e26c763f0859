"""A part of the training data is held out in a stage whose method learns something on it, such as AutoLoRA's ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import numpy as np
from torch import Tensor

from visionpeft.adapters.adapters import attached
from visionpeft.adapters.selection import Selection
from visionpeft.adapters.trained import selection_parameters
from visionpeft.data import ImageDataModule
from visionpeft.data.dataset import ImageDataset
from visionpeft.data.ordering import permutation, subset
from visionpeft.errors import ConfigurationError
from visionpeft.tasks.adapted_task import AdaptedTask


class HeldOutSteps(pl.Callback):
    """Before each training step, one step of the second optimiser on a batch of the held-out part.

    Which images are in a batch follows from the number of the step alone, so that a resumed run goes the same way. They
    are loaded in this process, and kept as training images are.

    Args:
        images: the held-out images, augmented as training images are.
        batch_size: images in a batch.
        seed: of their order.
    """

    def __init__(self, images: ImageDataset, batch_size: int, seed: int):
        self.images = images
        self.batch_size = min(batch_size, len(images))
        self.seed = seed
        self.selection: Selection | None = None
        self.saved: dict | None = None

    def state_dict(self) -> dict:
        """That of the second optimiser."""
        return {} if self.selection is None else self.selection.optimiser.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Keep it until there is an optimiser."""
        self.saved = state_dict

    def on_train_start(self, trainer: pl.Trainer, task: AdaptedTask) -> None:
        """Make the second optimiser."""
        self.selection = Selection(task.model, loss=lambda _, batch: _loss(task, batch))
        if self.saved:
            self.selection.optimiser.load_state_dict(self.saved)

    def on_train_batch_start(self, trainer: pl.Trainer, task: AdaptedTask, batch: list[Tensor], batch_idx: int) -> None:
        """One step of the second optimiser, where one of the first follows."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        held_out = [tensor.to(task.device) for tensor in self.batch(trainer.global_step)]
        self.selection.step(batch[:2], held_out, trainer.optimizers[0].param_groups[0]["lr"])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images and labels for a step: on and on through orders that are drawn for each pass."""
        number, first = len(self.images), step * self.batch_size
        places = [divmod(position, number) for position in range(first, first + self.batch_size)]
        orders = {turn: permutation(number, self.seed * 100_003 + turn) for turn in {turn for turn, _ in places}}
        return self.images.__getitems__([(int(orders[turn][place]), turn) for turn, place in places])


def _loss(task: AdaptedTask, batch: list[Tensor]) -> Tensor:
    images, labels = batch
    with task.of_tasks(labels):
        return task.objective.loss(task(images).float(), labels)


def held_out_number(task: AdaptedTask, datamodule: pl.LightningDataModule) -> int:
    """How many training images are held out, 0 for a method that learns nothing there.

    Raises:
        ConfigurationError: the data is another's data module, or too small, also for the one batch that `drop_last`
            asks for.
    """
    if not selection_parameters(task.model):
        return 0
    method = next(each for each in attached(task.model)[task.adapter_name].methods if each.held_out)
    name = type(method).__name__
    if not isinstance(datamodule, ImageDataModule):
        raise ConfigurationError(
            f"{name} learns on a part of the training images that is held out, which {type(datamodule).__name__} "
            "cannot give; use one of the data modules of visionpeft, or visionpeft.Selection in a loop of your own"
        )
    total = len(datamodule.sources["train"])
    number = round(method.held_out * total)
    if not 0 < number < total:
        raise ConfigurationError(
            f"{name}: held_out {method.held_out} of {total} training {datamodule.images.kind}s leaves one of the two "
            "parts empty"
        )
    if datamodule.drop_last and total - number < datamodule.batch_size:
        raise ConfigurationError(
            f"{name} holds out {number} of {total} training {datamodule.images.kind}s, and drop_last leaves no batch "
            f"of {datamodule.batch_size} of the other {total - number}; set --data.drop_last false or a smaller "
            "--data.batch_size"
        )
    return number


@contextmanager
def holding_out(task: AdaptedTask, datamodule: pl.LightningDataModule) -> Iterator[list[pl.Callback]]:
    """Within the context, the data has no held-out part for training, which the callback that is given learns on.

    Nothing is held out, and no callback given, for a method that learns nothing there.

    Raises:
        ConfigurationError: the data is another's data module, or too small, also for the one batch that `drop_last`
            asks for.
    """
    if not selection_parameters(task.model):
        yield []
        return
    datamodule.setup("fit")  # what it leaves out of the split is left out of both parts
    number, train = held_out_number(task, datamodule), datamodule.sources["train"]
    held = subset(len(train), number, task.seed)
    rest = np.setdiff1d(np.arange(len(train)), held)
    try:
        datamodule.sources["train"] = train.subset(held)
        steps = HeldOutSteps(datamodule.dataset("train"), datamodule.batch_size, task.seed)
        datamodule.sources["train"] = train.subset(rest)
        yield [steps]
    finally:
        datamodule.sources["train"] = train
