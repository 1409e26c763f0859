"""How many optimiser steps a training will make, epoch by epoch."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from visionpeft.errors import ConfigurationError


@dataclass(frozen=True)
class Steps:
    """Optimiser steps of a training.

    Args:
        by_epoch: how many steps each epoch that is begun makes if it is not cut short.
        total: all steps, fewer than those of the epochs where their number is limited.
    """

    by_epoch: tuple[int, ...]
    total: int

    def before(self, epoch: float) -> float:
        """Steps before a point in the training, in epochs; epochs after the last are taken to be like it."""
        whole = math.floor(epoch)
        made = sum(self.by_epoch[:whole]) + self.by_epoch[-1] * max(0, whole - len(self.by_epoch))
        return made + (epoch - whole) * self.by_epoch[min(whole, len(self.by_epoch) - 1)]

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to, counted from 0 like it."""
        beyond = max(0, step - self._ends[-1]) // self.by_epoch[-1]
        return bisect_right(self._ends, step) + beyond

    @cached_property
    def _ends(self) -> list[int]:
        """Steps made at the end of each epoch."""
        return list(accumulate(self.by_epoch))


def scheduled_accumulation(trainer: pl.Trainer) -> GradientAccumulationScheduler | None:
    """The callback that sets over how many batches gradients are accumulated in each epoch, if there is one."""
    found = [each for each in trainer.callbacks if isinstance(each, GradientAccumulationScheduler)]
    return found[-1] if found else None


def planned_steps(trainer: pl.Trainer) -> Steps:
    """What a trainer will do, whose data is known. Lightning's own estimate takes every epoch to be like the present.

    Raises:
        ConfigurationError: the training has no end.
    """
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise ConfigurationError("the learning rate follows a cosine to its end: set trainer.max_epochs")
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    batches, limit = trainer.num_training_batches, trainer.max_steps
    if batches == math.inf:
        if limit == -1:
            raise ConfigurationError("the data does not say how long an epoch is: set trainer.max_steps")
        return Steps((max(1, limit),), limit)
    scheduler = scheduled_accumulation(trainer)

    def of(epoch: int) -> int:
        accumulated = scheduler.get_accumulate_grad_batches(epoch) if scheduler else trainer.accumulate_grad_batches
        return max(1, math.ceil(batches / accumulated))

    epochs = math.inf if trainer.max_epochs == -1 else max(1, trainer.max_epochs)
    most = math.inf if limit == -1 else max(1, limit)
    by_epoch, made = [], 0
    while len(by_epoch) < epochs and made < most:
        by_epoch.append(of(len(by_epoch)))
        made += by_epoch[-1]
    return Steps(tuple(by_epoch), made if limit == -1 else min(made, limit))
