"""What all tasks share: metrics, the randomness of an epoch, optimiser, and checkpoints of what is trained."""

import random
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.data import ImageDataModule, VideoDataModule
from visionpeft.data.dataset import Part
from visionpeft.errors import ConfigurationError, DataError
from visionpeft.tasks.averaging import average_trained_only
from visionpeft.tasks.batches import Images, images_and_labels, images_of, number_of, unread_pixels
from visionpeft.tasks.callbacks import check_callbacks, check_resuming, finish_training, stop_as_before
from visionpeft.tasks.checkpointing import (
    DivergedError,
    check_trained,
    complete_copies,
    go_on_within_epoch,
    keep_trained,
    skip_delivered,
)
from visionpeft.tasks.divergence import Divergence
from visionpeft.tasks.metrics import MeanLoss
from visionpeft.tasks.objective import Objective
from visionpeft.tasks.objectives import OneClass
from visionpeft.tasks.optimisation import (
    Optimisation,
    build_optimizer,
    build_schedule,
    output_side,
    parameter_groups,
    set_peak_rates,
)
from visionpeft.tasks.steps import Steps, planned_steps

LEARNT_BY = {"masks": "SemanticSegmentation", "objects": "ObjectDetection"}  # labels that one task alone takes


class ImageTask(pl.LightningModule):
    """Base of the tasks that map images, (batch, 3, height, width), or clips of them -> logits (batch, outputs).

    A task implements `forward`, `training_loss` and the abstract methods below.

    Args:
        class_names: one name for each class.
        optimisation: optimiser, learning rates and schedule.
        seed: the randomness of an epoch (dropout, mixup) is a function of the seed and the epoch.
        objective: what is learnt and measured; by default one class of these.

    Attributes:
        preprocessing: how the backbone wants its images.
        folder: name of the folder in a run directory that `save` writes.
        kind: what is classified, "images" or "videos".
        tasks: number of classes of each task, where the data has several; else None.
    """

    preprocessing: Preprocessing
    folder: str
    kind = "images"
    tasks: dict[str, int] | None = None

    def __init__(
        self, class_names: list[str], optimisation: Optimisation, seed: int, objective: Objective | None = None
    ):
        super().__init__()
        self.objective = OneClass(len(class_names)) if objective is None else objective
        self.strict_loading = False  # checkpoints hold no backbone; `on_load_checkpoint` checks what they hold
        self.class_names = list(class_names)
        self.optimisation = optimisation
        self.seed = seed
        self.steps: Steps | None = None  # of the training for which the optimiser was made
        self._configured: tuple = ()
        self._peak_rates: list[float] = []  # of the optimiser's groups
        self._trains = False
        self._delivered: list[dict] = []  # by the loaders, of the epoch in which a checkpoint was taken
        self.train_metrics, self.val_metrics, self.test_metrics = (
            MetricCollection(
                {"loss": MeanLoss(), **self.objective.metrics(split)}, compute_groups=False, prefix=f"{split}/"
            )
            for split in ("train", "val", "test")
        )
        self.divergence = Divergence()

    @property
    @abstractmethod
    def label(self) -> str:
        """What is trained, in the name of a run directory."""

    @abstractmethod
    def describe(self) -> dict:
        """What is trained on which backbone, for the record of a run."""

    @abstractmethod
    def training_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss of a batch, and its logits (batch, classes)."""

    def loss_weight(self, labels: Tensor) -> Tensor | None:
        """By what the sum over a batch is divided in `training_loss`, (); None if it is the number of samples."""
        return None

    def penalty(self) -> Tensor | float:
        """What is added to the loss of every batch."""
        return 0.0

    def of_tasks(self, labels: Tensor | None) -> AbstractContextManager:
        """Within the context the model knows the tasks of images with these labels (those of the first, of None)."""
        return nullcontext()

    @abstractmethod
    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimiser trains."""

    def head_parameters(self) -> list[nn.Parameter]:
        """Those of them that belong to a head with a learning rate of its own."""
        return []

    @abstractmethod
    def trained_keys(self) -> set[str]:
        """Keys of `state_dict` that a checkpoint keeps: what is trained, without the frozen backbone."""

    def not_averaged(self) -> str | None:
        """Why a callback could not average over steps what is trained, None if it can."""
        return None

    def reports_mean(self) -> str | None:
        """How what is trained ends with a mean of its own over the epochs, and what to do otherwise; None if not."""
        return None

    @abstractmethod
    def save(self, folder: Path, datamodule: pl.LightningDataModule) -> None:
        """Write what was trained."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what `save` wrote, in the place of what the task has."""

    def choose(self) -> None:
        """Choose on the validation split what depends on the trained values, after those to report were loaded."""

    def connect(self, datamodule: pl.LightningDataModule) -> None:
        """Tell the data how this backbone wants its images.

        Raises:
            ConfigurationError: the data has videos and the task takes images, or the other way round; or its labels
                are of another kind.
        """
        kind = "videos" if isinstance(datamodule, VideoDataModule) else "images"
        if isinstance(datamodule, ImageDataModule) and kind != self.kind:
            task = {"images": "ImageClassification", "videos": "VideoClassification"}[kind]
            raise ConfigurationError(
                f"{type(self).__name__} takes {self.kind}, but {type(datamodule).__name__} holds {kind}; use {task} "
                f"(--model {task}), or other data"
            )
        if isinstance(datamodule, ImageDataModule) and datamodule.labels != self.objective.labels:
            for labels in (datamodule.labels, self.objective.labels):
                if own := LEARNT_BY.get(labels):
                    raise ConfigurationError(
                        f"{labels} are learnt by {own} (--model {own}), and nothing else is: "
                        f"{type(datamodule).__name__} has labels {datamodule.labels!r}, which {type(self).__name__} "
                        "refuses"
                    )
            raise ConfigurationError(
                f"{type(self).__name__} learns from labels {self.objective.labels!r} here, but those of "
                f"{type(datamodule).__name__} are {datamodule.labels!r} (--data.labels)"
            )
        if isinstance(datamodule, ImageDataModule) and datamodule.tasks != self.tasks:
            known, given = (", ".join(tasks or ()) or "one task" for tasks in (self.tasks, datamodule.tasks))
            raise ConfigurationError(
                f"{type(self).__name__} has {known} to learn here, but the data has {given}; several tasks are learnt "
                "by ImageClassification from MultiTask data with the same tasks"
            )
        datamodule.preprocessing = self.preprocessing

    def check_before_training(self, datamodule: pl.LightningDataModule, processes: int = 1) -> None:
        """Refuse what is known to fail with the batches of this data, which is set up, shared by so many processes.

        Raises:
            ConfigurationError: the model does not take the images.
        """

    def configure_callbacks(self) -> list[pl.Callback]:
        """No further callbacks; those that the trainer has are looked at here, before they do anything.

        Raises:
            ConfigurationError: one cannot work with what is trained.
        """
        if self.trainer.state.fn == "fit":
            check_callbacks(self.trainer.callbacks, self)
        return []

    def setup(self, stage: str) -> None:
        """Connect task and data; before training, see to it that callbacks average what is trained.

        Raises:
            ConfigurationError: the objective cannot be computed in the trainer's precision.
        """
        self.objective.check_precision(self.trainer.precision)
        if self.trainer.datamodule is not None:
            self.connect(self.trainer.datamodule)
        if stage == "fit":
            self._configured, self._trains, self._delivered = (), False, []
            average_trained_only(self.trainer.callbacks)

    def on_train_epoch_start(self) -> None:
        """Seed the epoch, so that a resumed run draws what the uninterrupted one would have drawn.

        Each of several devices draws for itself, because its images are others.
        """
        self._seed_epoch()

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        """Seed the epoch's first batch: in between PyTorch's own data loader draws, but not when a run begins."""
        if batch_idx == 0:
            self._seed_epoch()

    def _seed_epoch(self) -> None:
        seed = _epoch_seed(self.seed, self.current_epoch, self.global_rank)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  (timm's mixup draws from NumPy's global generator)
        torch.manual_seed(seed)

    def on_test_epoch_start(self) -> None:
        """Seed the test, for what is random in it."""
        torch.manual_seed(_epoch_seed(self.seed, 0))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of a batch with the penalty, which is not measured.

        Raises:
            DivergedError: the loss is not finite, or that of an earlier step since the device was last read.
            DataError: the batch is no pair of images and labels, or these are none of those that are learnt; or the
                loss is not finite because pixels are not.
        """
        images, labels, part = images_and_labels(batch)
        labels = self.objective.read(labels, number_of(images))
        with self.of_tasks(labels):
            measured, logits = self.training_loss(images, labels)
            share, samples = self._share_of_step(labels, part)
            loss = measured if share is None else measured * (share * self.trainer.world_size)
            loss = loss + self.penalty()
        self.divergence.note(loss, self.global_step)
        # A CPU has the answer at once. Another device would be waited for, so it is asked once per logging interval,
        # and at the end of an epoch, before anything is validated or saved.
        interval = 1 if loss.device.type == "cpu" else max(1, self.trainer.log_every_n_steps)
        if (batch_idx + 1) % interval == 0 or self.trainer.is_last_batch:
            self._check_divergence(images)
        measured = measured.detach()
        if share is not None and samples.own:  # so that the mean over all samples is that of the whole batches' losses
            measured = measured * (share * samples.together / samples.own)
        self._measure(self.train_metrics, measured, logits.detach(), labels, counts=samples is None or samples.own > 0)
        return loss

    def _check_divergence(self, images: Images) -> None:
        try:
            self.divergence.check(self.current_epoch)
        except DivergedError as error:
            if found := unread_pixels(images):
                raise DataError(
                    f"{found} have pixels that are no finite numbers, so that the training loss is none; let the "
                    "loader fill them, such as what a GeoTIFF marks as without data"
                ) from error
            raise

    def _share_of_step(self, labels: Tensor, part: Part | None = None) -> tuple[Tensor | float | None, Part | None]:
        """The share that this process has in the mean over the batches of all, where they are not all equal.

        Gradients are averaged over processes; times share and number of processes, a mean over a process's own batch
        becomes its part of the mean over the samples of all, as one process with the whole batch has it.
        """
        alone = self._trainer is None or self.trainer.world_size == 1
        weight = None if alone else self.loss_weight(labels)
        if weight is None:
            return (None, None) if part is None else (part.own / part.together, part)
        part = part or Part(len(labels), len(labels) * self.trainer.world_size)
        weight = weight if part.own else torch.zeros_like(weight)
        total = weight.clone()
        torch.distributed.all_reduce(total)
        return weight / total, part

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure a batch of the validation split."""
        self._evaluate(self.val_metrics, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Measure a batch of the test split and return its logits."""
        return self._evaluate(self.test_metrics, batch)

    def predict_step(self, batch, batch_idx: int) -> Tensor:
        """Class probabilities (batch, classes), those of several labels (batch, labels), or numbers (batch,)."""
        return self.objective.answers(self(images_of(batch)).float())

    def _evaluate(self, metrics: MetricCollection, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels, _ = images_and_labels(batch)
        labels = self.objective.read(labels, number_of(images))
        with self.of_tasks(labels):
            logits = self.objective.judged(self(images).float(), labels)
        self._measure(metrics, self.objective.measured_loss(logits, labels), logits, labels)
        return logits

    def _measure(
        self,
        metrics: MetricCollection,
        loss: Tensor,
        logits: Tensor,
        labels: Tensor,
        counts: bool = True,
        weight: Tensor | None = None,
    ) -> None:
        """Take a batch into metrics, where it counts at all; its loss weighs as many as its samples, or `weight`."""
        for name, metric in metrics.items():
            if not counts:
                pass  # it is logged all the same, as all processes have to do that together
            elif name.endswith("loss"):
                metric.update(loss, len(labels) if weight is None else weight)
            else:
                self.objective.measure(metric, logits, labels)
            self.log(name, metric, on_step=False, on_epoch=True, batch_size=len(labels))

    def configure_optimizers(self) -> dict:
        """AdamW or SGD over what is trained, with a schedule that advances every step."""
        self.steps = planned_steps(self.trainer)
        self._configured = self._depends_on()
        groups = parameter_groups(
            self.trained_parameters(),
            self.head_parameters(),
            self.optimisation,
            self._samples_per_step(),
            output_side(self),
            self.layer_distances(),
            self.norm_parameters(),
        )
        optimizer = build_optimizer(groups, self.optimisation)
        schedule = build_schedule(optimizer, self.optimisation, self.steps)
        self._peak_rates = list(schedule.base_lrs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _samples_per_step(self) -> int:
        trainer = self.trainer
        return getattr(trainer.datamodule, "batch_size", 1) * trainer.accumulate_grad_batches * trainer.world_size

    def _depends_on(self) -> tuple:
        """What the optimiser is made of, and callbacks that search may have changed since."""
        return self.optimisation, self._samples_per_step(), self.trainer.num_training_batches

    @property
    def lr(self) -> float:
        """The learning rate as the optimiser has it at its peak; Lightning's finder sets it."""
        return self.optimisation.lr * self._rate_scale()

    @lr.setter
    def lr(self, rate: float) -> None:
        self.optimisation = replace(self.optimisation, lr=rate / self._rate_scale())

    def _rate_scale(self) -> float:
        reference = self.optimisation.scale_lr_by_batch
        return self._samples_per_step() / reference if reference else 1.0

    def on_fit_start(self) -> None:
        """Make the optimiser again where a callback has found another learning rate or batch size."""
        if self._configured and self._configured != self._depends_on():
            self.trainer.strategy.setup_optimizers(self.trainer)
        stop_as_before(self.trainer)

    def on_train_start(self) -> None:
        """Note that there is something to train, and take the learning rates given in the place of a checkpoint's."""
        self._trains = True
        if self._delivered:
            skip_delivered(self.trainer.train_dataloader, self._delivered)
        for config in self.trainer.lr_scheduler_configs:
            set_peak_rates(config.scheduler, self._peak_rates)

    def on_fit_end(self) -> None:
        """Leave what a training leaves, also if the one that was resumed had finished."""
        if not self._trains:
            finish_training(self.trainer, self)

    def norm_parameters(self) -> list[nn.Parameter]:
        """Those of the trained parameters that belong to norms of the backbone."""
        return []

    def layer_distances(self) -> dict[nn.Parameter, int] | None:
        """How many layers from the output each trained parameter acts, None where there are no such layers."""
        return None

    @property
    def num_epochs(self) -> int:
        """Epochs of the training, also where it is the number of steps that is limited, or both are."""
        epochs = self.trainer.max_epochs
        if epochs == 0 or self.trainer.max_steps == -1:
            return epochs
        return len((self.steps or planned_steps(self.trainer)).by_epoch)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Keep only what is trained and what the objective has learnt, and nothing of a training that has diverged."""
        self.divergence.check(self.current_epoch)
        keep_trained(checkpoint, self.trained_keys())
        if state := self.objective.state():
            checkpoint["objective"] = state

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Check that every trained tensor is there, and take what else the checkpoint knows.

        That is what the objective had learnt; the states that callbacks will load are completed, and an epoch in which
        it was taken goes on.
        """
        if self._trainer is not None and self.trainer.state.fn == "fit" and not self._configured:
            check_resuming(self.trainer.callbacks)
        check_trained(checkpoint, self, self.trained_keys())
        complete_copies(checkpoint, self, self.trained_keys())
        self.objective.load_state(checkpoint.get("objective", {}))
        self._delivered = go_on_within_epoch(checkpoint)


def _epoch_seed(seed: int, epoch: int, rank: int = 0) -> int:
    """A 32-bit seed for an epoch on a device."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return int(torch.randint(2**32 - 1, (rank + 1,), generator=generator)[rank])
