"""A run in stages: each training but the last in a folder of its own, and after it what the method has chosen.

The run directory of a method that is trained in stages has `stages/1`, `stages/2` ... with the checkpoints and metrics
of each training before the last, and in `stages/1/choice.safetensors` what the next one begins with: the methods and
all values of the adapter. The last training is that of the run directory itself, as that of any other method is. A
stage with a choice is over; the first without one is where a run resumes, from its last checkpoint if it has one.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from visionpeft.adapters.allocate import remake
from visionpeft.adapters.described_tensors import check_tensors, read_described, write_described
from visionpeft.adapters.stages import begin_next, staged, start_of
from visionpeft.adapters.storage import method_from
from visionpeft.errors import ConfigurationError, StorageError
from visionpeft.methods.parts.base import Method, describe_method
from visionpeft.runs.checkpoint_files import AtomicCheckpointIO, checkpoint_callbacks
from visionpeft.runs.cli import CLI
from visionpeft.runs.command import Interrupted
from visionpeft.runs.held_out import held_out_number, holding_out
from visionpeft.runs.history import EpochHistory
from visionpeft.runs.progress import TrainingProgress
from visionpeft.runs.tables import print_stage
from visionpeft.runs.training_cost import TrainingCost
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.tasks import ImageTask
from visionpeft.tasks.adapted_task import AdaptedTask

CHOICE = "choice"


def check_stages(cli: CLI) -> None:
    """Refuse options that do not go with a method that is trained in stages, or with one that is not.

    Raises:
        ConfigurationError: so it is.
    """
    task, given = cli.model, cli.config.stage_epochs
    method = staged(task.adapter) if isinstance(task, AdaptedTask) else None
    if method is None:
        if given is not None:
            raise ConfigurationError(
                f"--stage_epochs is about methods that are trained in stages, and {task.label} is trained once; leave "
                "it out"
            )
        return
    name, trainer = type(method).__name__, cli.config_init.trainer
    held_out_number(task, cli.datamodule)
    if given is not None and len(given) != method.stages_after:
        raise ConfigurationError(
            f"--stage_epochs gives {len(given)} numbers, but {name} has {method.stages_after} "
            f"training{'s' if method.stages_after > 1 else ''} before the last; give one number for each of them, as "
            f"in --stage_epochs [{', '.join(['5'] * method.stages_after)}]"
        )
    if any(epochs < 1 for epochs in given or ()):
        raise ConfigurationError(f"--stage_epochs {given} leaves a training of {name} without an epoch; give 1 or more")
    for option in ("max_epochs", "max_steps"):
        value = trainer.get(option)
        if value is not None and value == 0:
            raise ConfigurationError(
                f"{name} chooses by a training what it trains next, and --trainer.{option} 0 leaves none"
            )
    if cli.trainer.world_size > 1:
        raise ConfigurationError(f"{name} is trained in stages, on one device; set --trainer.devices 1")
    for option in ("cache", "compile"):
        if getattr(task, {"cache": "trunk", "compile": "compiled"}[option], None):
            raise ConfigurationError(
                f"{name} is trained in stages, each with another model, and {option} is made for one; leave {option} "
                "out"
            )


def train_stages(cli: CLI, run: RunDirectory) -> list[dict]:
    """Train all stages but the last, as far as the run directory does not have them; the task is ready for the last.

    Args:
        cli: the run's task, data and trainer.
        run: its directory.

    Returns:
        Epochs, seconds and peak memory of each of these stages; none for a method that is trained once.

    Raises:
        ConfigurationError: the run directory is that of another method.
        StorageError: a choice is damaged.
    """
    task, records = cli.model, []
    adapted = isinstance(task, AdaptedTask)
    method = staged(task.adapter) if adapted else None
    if method is None:
        if (run.path / "stages").is_dir():
            raise ConfigurationError(
                f"{run.path} is a run in stages, and {task.label} is trained once; resume it as it was"
            )
        return records
    start, count = start_of(task.adapter), method.stages_after + 1
    for number in itertools.count(1):
        if staged(task.adapter) is None:
            print_stage(number, count, task.describe()["parameters"])
            return records
        stage = RunDirectory(run.path / "stages" / str(number))
        if not (stage.path / f"{CHOICE}.safetensors").is_file():
            print_stage(number, count, task.describe()["parameters"])
            _train_stage(cli, run, stage, number, start)
        # Also where it was just made, so that a run which is resumed here goes the same way.
        records.append(_begin(task, stage.path))


def _train_stage(cli: CLI, run: RunDirectory, stage: RunDirectory, number: int, start: Mapping) -> None:
    """Train one stage and write what follows from it."""
    task, cost = cli.model, TrainingCost()
    options = {} if cli.config.stage_epochs is None else {"max_epochs": cli.config.stage_epochs[number - 1]}
    stage.path.mkdir(parents=True, exist_ok=True)
    with holding_out(task, cli.datamodule) as held_out:
        callbacks = [*held_out, EpochHistory(stage.metrics), *checkpoint_callbacks(stage, False, task.objective)]
        trainer = cli.build_trainer(
            [cost, *callbacks, TrainingProgress()],
            of_stage=True,
            logger=TensorBoardLogger(stage.path, name="", version="tensorboard"),
            plugins=[AtomicCheckpointIO()],
            default_root_dir=stage.path,
            enable_progress_bar=False,
            **options,
        )
        train(trainer, task, cli.datamodule, stage, run)
    methods = [describe_method(each) for each in task.adapter.methods]
    task.to(trainer.strategy.root_device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed * 1_000_003 + number)  # what is drawn for a stage is not that of another one
        begin_next(task.model, task.adapter_name, start, task.shown(cli.datamodule), task.loss_of_shown)
    description = {
        "trained": methods,
        "methods": [describe_method(each) for each in task.adapter.methods],
        "epochs": trainer.current_epoch,
        "training_seconds": round(cost.seconds, 2),
        "peak_memory_bytes": cost.peak_memory,
    }
    if held_out:
        description["held_out_samples"] = sum(len(each.images) for each in held_out)
    write_described(stage.path, CHOICE, task.adapter.state_dict(), description)


def _begin(task: AdaptedTask, folder: Path) -> dict:
    """Put the adapter at the beginning of the stage after a choice; what that says of its own stage."""
    description, tensors = read_described(folder, CHOICE, _check_description)
    known = [_given([method_from(each) for each in description[key]]) for key in ("trained", "methods")]
    if _given(task.adapter.methods) not in known:
        raise ConfigurationError(
            f"the choice in {folder} was made by another method or with other options than {task.label} has; resume "
            "the run as it was"
        )
    remake(task.model, task.adapter_name, [method_from(each) for each in description["methods"]], tensors, {})
    check_tensors(tensors, task.adapter.state_dict(), f"the choice in {folder}")
    return {key: description[key] for key in ("epochs", "training_seconds", "peak_memory_bytes")}


def _given(methods: Sequence[Method]) -> str:
    """What was given of some methods, without what they have found; as JSON, where a tuple of a default is a list."""
    described = [describe_method(each) for each in methods]
    for each, method in zip(described, methods, strict=True):
        each["fields"] = {name: value for name, value in each["fields"].items() if name not in method.found}
    return json.dumps(described)


def _check_description(description: object, path: Path) -> None:
    keys = {"trained", "methods", "epochs", "training_seconds", "peak_memory_bytes"}
    if not isinstance(description, dict) or not keys <= description.keys():
        raise StorageError(f"{path} is no choice of a stage; delete {path.parent} to train that stage again")


def train(
    trainer: pl.Trainer, task: ImageTask, datamodule: pl.LightningDataModule, folder: RunDirectory, run: RunDirectory
) -> None:
    """Train from the last checkpoint of a folder, or from the beginning if there is none.

    Args:
        trainer: the trainer.
        task: what is trained.
        datamodule: its data.
        folder: the run directory, or the folder of a stage.
        run: the run directory, which an interrupted run is continued from.
    """
    checkpoint = folder.last_checkpoint if folder.last_checkpoint.is_file() else None
    try:
        trainer.fit(task, datamodule, ckpt_path=checkpoint)
    except SystemExit:  # Lightning's answer to Ctrl-C
        if not trainer.interrupted:
            raise
        raise Interrupted(
            f"interrupted in epoch {trainer.current_epoch + 1} of {trainer.max_epochs}; finished epochs are kept. "
            f"Continue with: python -m visionpeft.fit --resume {run.path}"
        ) from None
