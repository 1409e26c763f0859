"""What the tasks share that train adapters and a head on a frozen backbone."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import lightning.pytorch as pl
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from visionpeft.adapters.allocate import evaluating, remake
from visionpeft.adapters.attach import detach
from visionpeft.adapters.attached_adapter import AttachedAdapter
from visionpeft.adapters.economise import economise
from visionpeft.adapters.head_layout import dense_head_from_layout
from visionpeft.adapters.install import stood_in_for
from visionpeft.adapters.over_folders import attach_over_folders
from visionpeft.adapters.start import start_from
from visionpeft.adapters.storage import is_older, load, method_from, read_metadata, save
from visionpeft.adapters.switch import plain
from visionpeft.adapters.trained import layer_distances, trainable_parameters
from visionpeft.adapters.training_hooks import after_step, penalty
from visionpeft.data import ImageDataModule
from visionpeft.errors import ConfigurationError, UserError, one_line
from visionpeft.heads import DenseHead
from visionpeft.methods import Method
from visionpeft.methods.parts.base import describe_method
from visionpeft.sharing.trained_model import learnt_objective
from visionpeft.tasks.allocating import allocate_alone, allocate_together
from visionpeft.tasks.averaging import copy_again
from visionpeft.tasks.batches import check_double, images_and_labels, number_of
from visionpeft.tasks.compiling import check_device, compile_in_place, in_one_sentence, not_compiled
from visionpeft.tasks.objective import Objective
from visionpeft.tasks.objectives import OneClass
from visionpeft.tasks.optimisation import Optimisation
from visionpeft.tasks.task import ImageTask


class AdaptedTask(ImageTask):
    """Base of the tasks that train adapters and a head on a frozen backbone.

    The frozen modules stay in evaluation mode while training; adapter and head are in training mode. A task builds
    `model` and its `preprocessing`, and calls `adapt`.

    Args:
        method: the method, or several that are stacked in order.
        class_names: one name for each class.
        backbone: name of the backbone.
        label_smoothing: probability mass spread evenly over all classes.
        optimisation: optimiser, learning rates and schedule.
        seed: the randomness of an epoch is a function of the seed and the epoch.
        objective: what is learnt; by default one class, by cross-entropy with that smoothing.
    """

    folder = "adapter"
    model: nn.Module
    head: DenseHead | None = None  # on the maps of a backbone
    economies: Mapping[str, object]  # how the model saves time or memory, as `economise` takes it

    def __init__(
        self,
        method: Method | list[Method],
        class_names: list[str],
        backbone: str,
        label_smoothing: float,
        optimisation: Optimisation,
        seed: int,
        objective: Objective | None = None,
    ):
        if objective is None:
            objective = OneClass(len(class_names), label_smoothing)
        super().__init__(class_names, optimisation, seed, objective)
        self.backbone_name = backbone
        self.methods = list(method) if isinstance(method, list | tuple) else [method]
        self.label_smoothing = label_smoothing
        self.adapter_name = "default"
        self._last_pass: tuple[Tensor, Tensor] | None = None  # images and logits, until the penalty has read them
        for each in self.methods:
            if each.compares_passes and self.objective.labels != "classes":
                raise ConfigurationError(
                    f"{type(each).__name__} compares the class probabilities of two passes, which labels "
                    f"{self.objective.labels!r} do not have; set its consistency to 0"
                )
        self.compiled = False
        self.drops_blocks = False

    def backbone_arguments(self, given: dict | None, drop_path: float) -> dict:
        """Arguments of the function that creates the backbone.

        Stochastic depth of the backbone, which timm makes some models with (Swin with a rate of .1), is active while
        training only if a rate is given here.
        """
        arguments = dict(given or {}) | ({"drop_path_rate": drop_path} if drop_path else {})
        self.drops_blocks = bool(arguments.get("drop_path_rate"))
        return arguments

    def adapt(self, train: Iterable[str] | None = None, start: str | None = None, **economies: object) -> None:
        """Attach the methods to the model.

        Args:
            train: names of further parameters of the backbone to train.
            start: folder of a saved adapter of the same methods, from whose values training starts.
            economies: what `visionpeft.economise` is asked for.
        """
        attach_over_folders(self.model, self.methods, self.adapter_name, tuple(train or ()))
        if start:
            start_from(self.model, start, self.adapter_name)
        self.economies = economies
        economise(self.model, **economies)

    def compile_model(self) -> None:
        """Let the model run as one compiled graph from now on; what is trained and saved stays what it is.

        Raises:
            ConfigurationError: there is no compiler.
        """
        compile_in_place(self.model)
        self.compiled = True

    def run_model(self, inputs: Tensor, **options) -> Tensor:
        """Logits of the model, whether it is compiled or not; options are those of its forward.

        Raises:
            ConfigurationError: it cannot be compiled as one graph.
            DataError: the images are float64, as NumPy's arithmetic leaves them, and the model is not.
        """
        if isinstance(inputs, Tensor) and inputs.dtype == torch.float64:
            check_double(self.model)
        if not self.compiled:
            return self.model(inputs, **options)
        with in_one_sentence():
            return self.model(inputs, **options)

    @property
    def adapter(self) -> AttachedAdapter:
        """The attached adapter with its head."""
        return self.model.peft[self.adapter_name]

    @property
    def label(self) -> str:
        """Names of the methods."""
        return "+".join(type(method).__name__ for method in self.methods)

    def describe(self) -> dict:
        """Methods, backbone and parameter counts, `waiting` while what else is trained is to be chosen by the data."""
        unused = stood_in_for(self.model)
        total = sum(parameter.numel() for parameter in self.model.parameters() if parameter not in unused)
        trainable = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        return {
            "method": [describe_method(method) for method in self.methods],
            "backbone": self.model.backbone_source,
            "parameters": {
                "trainable": trainable,
                "adapter": self.adapter.num_parameters(),
                "total": total,
                "share": trainable / total,
                **({"waiting": True} if self.adapter.pending else {}),
            },
            "objective": self.objective.describe(),
        }

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, outputs)."""
        return self.run_model(images)

    def example(self) -> Tensor:
        """A batch of one input, of zeros."""
        return torch.zeros(1, 3, *self.preprocessing.input_size)

    def check_before_training(self, datamodule: pl.LightningDataModule, processes: int = 1) -> None:
        """Show the objective the labels and the model one input, and look at the size of the last batch.

        Raises:
            ConfigurationError: the model does not take inputs of this size and number of channels, or a batch of one
                would meet a head that takes statistics of a batch; or weights cannot be computed from the labels.
        """
        self._learn_labels(datamodule)
        self._check_last_batch(datamodule, processes)
        example = self.example()
        if next(self.model.parameters()).dtype != example.dtype:
            return  # the trainer's precision decides
        try:
            # A method that has to see data first cannot act yet.
            acting = plain(self.model) if self.adapter.pending else nullcontext()
            with torch.no_grad(), evaluating(self.model), acting, self.uncompiled(), self.of_tasks(None):
                self.model(example)
        except UserError:
            raise
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
            height, width = example.shape[-2:]
            raise ConfigurationError(
                f"{self.backbone_name} with these arguments does not take colour {self.kind} of {height} x {width} "
                f"pixels: {one_line(error)}"
            ) from error

    def uncompiled(self) -> AbstractContextManager:
        """Within the context the model runs as it is, for passes that do not come again."""
        return not_compiled() if self.compiled else nullcontext()

    def setup(self, stage: str) -> None:
        """As for every task; before training, look at all labels, and check its last batch.

        Raises:
            ConfigurationError: the model cannot be compiled for the trainer's device.
        """
        super().setup(stage)
        if self.compiled:
            check_device(self.trainer.strategy.root_device)
        if stage == "fit" and self.trainer.datamodule is not None:
            self._learn_labels(self.trainer.datamodule)
            self._check_last_batch(self.trainer.datamodule, self.trainer.world_size)
            if self.trainer.world_size > 1 and self.adapter.pending:
                allocate_together(self)

    def _learn_labels(self, datamodule: pl.LightningDataModule) -> None:
        if train := getattr(datamodule, "sources", {}).get("train"):
            self.objective.learn(train.labels, self.class_names)

    def _check_last_batch(self, datamodule: pl.LightningDataModule, processes: int) -> None:
        """Refuse a last batch of one where statistics of a batch are taken.

        Raises:
            ConfigurationError: it would be such a batch.
        """
        images = getattr(datamodule, "sources", {}).get("train", ())
        if getattr(datamodule, "drop_last", False) or not any(
            isinstance(module, nn.BatchNorm1d) or getattr(module, "needs_several_images", False)
            for module in self.adapter.modules()
        ):
            return
        count, size = len(images), datamodule.batch_size
        shares = {count // processes, -(-count // processes)}
        if count and (size == 1 or any(share % size == 1 for share in shares)):
            among = f" on {processes} devices" if processes > 1 else ""
            raise ConfigurationError(
                f"{count} training {self.kind} in batches of {size}{among} leave one alone in a batch, of which "
                "the batch normalisation of the head can take no statistics; set --data.drop_last true, or another "
                "--data.batch_size"
            )

    def train(self, mode: bool = True):
        """Training mode for adapter, head and active stochastic depth; the frozen rest stays in evaluation mode."""
        super().train(mode)
        if mode:
            self.model.eval()
            self.model.peft.train()
            for module in self.model.modules() if self.drops_blocks else ():
                if isinstance(module, DropPath):
                    module.train()
        return self

    def training_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and logits."""
        logits = self.noted_pass(images)
        return self.objective.loss(logits.float(), labels), logits

    def noted_pass(self, images: Tensor) -> Tensor:
        """Logits (batch, outputs) of a pass that the methods may compare with another one of the same images."""
        logits = self(images)
        self._last_pass = images, logits
        return logits

    def loss_weight(self, labels: Tensor) -> Tensor | None:
        """By what the objective divides."""
        return self.objective.loss_weight(labels)

    def penalty(self) -> Tensor | float:
        """What the methods add to the loss."""
        if self._last_pass is None:
            return penalty(self.model)
        (images, logits), self._last_pass = self._last_pass, None
        return penalty(self.model, logits.float(), lambda: self(images).float())

    def optimizer_step(self, *args, **kwargs) -> None:
        """One step of the optimiser, then what the methods do after it."""
        super().optimizer_step(*args, **kwargs)
        if self.trainer.max_epochs >= 0 and self.current_epoch >= len(self.steps.by_epoch):
            return  # StochasticWeightAveraging's pass for the statistics of batch normalisation, without gradients
        # What a callback that searches makes under its own limit of steps can be more than the training will.
        total = self.steps.total if self.trainer.max_epochs >= 0 else self.trainer.max_steps
        after_step(self.model, self.trainer.global_step + 1, total)

    def configure_optimizers(self) -> dict:
        """As for every task; before it, methods that wait for data see those of the first epoch."""
        if self.adapter.pending:
            allocate_alone(self)
        return super().configure_optimizers()

    def on_fit_start(self) -> None:
        """As for every task; look at the last batch, whose size a callback may have changed."""
        super().on_fit_start()
        if self.trainer.datamodule is not None:
            self._check_last_batch(self.trainer.datamodule, self.trainer.world_size)

    def loss_of_shown(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean loss of a batch, as methods see it that choose by the data."""
        images, labels, _ = images_and_labels(batch)
        labels = self.objective.read(labels, number_of(images))
        with self.of_tasks(labels):
            return self.objective.measured_loss(self(images).float(), labels)

    def shown(self, datamodule: pl.LightningDataModule) -> Iterable:
        """The training batches that such methods see, those of one device that trains alone."""
        # Another's data module has not shared its batches among several devices yet.
        return datamodule.train_loader() if isinstance(datamodule, ImageDataModule) else datamodule.train_dataloader()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Keep what is trained, and the methods with what they have found in the data."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["methods"] = [describe_method(method) for method in self.adapter.methods]

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Place the methods as they were, an older version's as it had them; every trained tensor must be there."""
        if self.adapter.pending or any(is_older(each) for each in checkpoint.get("methods", ())):
            remake(self.model, self.adapter_name, [method_from(each) for each in checkpoint["methods"]], {})
            if self._trainer is not None:
                copy_again(self.trainer.callbacks, self.trainer, self)
        super().on_load_checkpoint(checkpoint)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Adapter and head."""
        return trainable_parameters(self.model)

    def layer_distances(self) -> dict[nn.Parameter, int]:
        """How many layers from the output each trained parameter acts."""
        return layer_distances(self.model)

    def norm_parameters(self) -> list[nn.Parameter]:
        """Trained copies of the parameters of modules that have vectors alone."""
        norms = []
        for name in self.adapter.trained_names:
            owner = self.model.get_submodule(name.rpartition(".")[0])
            if all(parameter.ndim <= 1 for parameter in owner.parameters(recurse=False)):
                norms.append(self.adapter.get_parameter(f"trained.{name}"))
        return norms

    def head_parameters(self) -> list[nn.Parameter]:
        """The head."""
        return self.adapter.head_parameters()

    def trained_keys(self) -> set[str]:
        """Everything of the adapters."""
        return {key for key in self.state_dict() if key.startswith("model.peft.")}

    def save(self, folder: Path, datamodule: pl.LightningDataModule) -> None:
        """Write the adapter, as `visionpeft.load` reads it."""
        save(
            self.model,
            folder,
            class_names=self.class_names,
            preprocessing=datamodule.preprocessing,
            metadata={"data": datamodule.description(), "objective": self.objective.describe()},
        )

    def load(self, folder: Path) -> None:
        """Read an adapter in the place of the attached one.

        Raises:
            ConfigurationError: it has learnt from labels of another kind, or other classes, or has another head on maps
                than the task was given.
        """
        if self.head is not None:
            check_same_head(self.head, folder)
        description = read_metadata(folder)
        learnt = learnt_objective(description, folder)
        if learnt["labels"] != self.objective.labels:
            raise ConfigurationError(
                f"the adapter in {folder} has learnt from labels {learnt['labels']!r}, not {self.objective.labels!r}; "
                "leave --data.labels as in its training"
            )
        if (tasks := learnt.get("tasks")) != self.tasks:
            known, given = (", ".join(each or ()) or "one task" for each in (tasks, self.tasks))
            raise ConfigurationError(
                f"the adapter in {folder} has learnt {known}, and the data has {given}; test on the tasks of both"
            )
        names = description.get("class_names")
        if names is not None and names != self.class_names:
            raise ConfigurationError(
                f"the adapter in {folder} tells other classes apart than the data has "
                f"({first_difference(names, self.class_names)}); its head knows them by their order, so test on data "
                "with the same names"
            )
        detach(self.model)
        self.adapter_name = load(self.model, folder)
        economise(self.model, **self.economies)
        self.objective.load_description(learnt)


def check_same_head(head: DenseHead, folder: Path) -> None:
    """Refuse a head other than that of a saved adapter, which would be measured without a word about it.

    Raises:
        ConfigurationError: its fields or its class differ.
    """
    layout = read_metadata(folder)["heads"].get("head", {})
    if "fields" in layout and (saved := dense_head_from_layout(layout)) != head:
        raise ConfigurationError(
            f"the head of the adapter in {folder} is {saved!r}, and {head!r} is asked for; leave the head as trained"
        )


def first_difference(names: Sequence[str], others: Sequence[str]) -> str:
    """Where class names differ from others, in words: in their number, or in the first name that is another one."""
    if len(names) != len(others):
        return f"{len(names)}, not {len(others)}"
    pairs = enumerate(zip(names, others, strict=True))
    return next(f"class {index} is {own!r}, not {other!r}" for index, (own, other) in pairs if own != other)
