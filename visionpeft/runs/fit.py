"""`python -m visionpeft.fit --config vtab_vpt.yaml`: train, test once, and leave everything in a run directory."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from visionpeft.errors import ConfigurationError, UserError
from visionpeft.files import claim, replacing, write_json
from visionpeft.runs.agreement import Peers, what_must_agree
from visionpeft.runs.before_training import check_before_training
from visionpeft.runs.carried import as_carried, carry
from visionpeft.runs.checkpoint_files import AtomicCheckpointIO, checkpoint_callbacks
from visionpeft.runs.cli import CLI
from visionpeft.runs.command import is_started
from visionpeft.runs.config_files import parsed
from visionpeft.runs.ending import how_to_go_on, nothing_half_written
from visionpeft.runs.environment import environment
from visionpeft.runs.figures import draw_curves
from visionpeft.runs.history import EpochHistory, read_history
from visionpeft.runs.hyper_parameters import log_hyper_parameters, log_outcome
from visionpeft.runs.limits import check_limits
from visionpeft.runs.processes import agreed_run, lost_peers, start, started_by_others
from visionpeft.runs.progress import TrainingProgress
from visionpeft.runs.results import batches, record_of, setting, tested
from visionpeft.runs.resuming import check_resumed, data_record, note_changes
from visionpeft.runs.sharding import EqualBatches, ShardedBackbone
from visionpeft.runs.stages import check_stages, train, train_stages
from visionpeft.runs.tables import print_results, print_setting
from visionpeft.runs.test_record import Record
from visionpeft.runs.training_cost import TrainingCost
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.tasks import ImageTask
from visionpeft.tasks.checkpointing import within_epoch


def fit(arguments: list[str]) -> None:
    """Train, test and report, as the command line says."""
    peers = Peers.started()
    try:
        cli, data = _checked(arguments)
    except (UserError, MisconfigurationException) as error:
        if peers is not None:
            peers.compare({}, failure=str(error))
        raise
    trainer, has_validation = cli.trainer, "val" in cli.datamodule.description()["sizes"]
    peers = peers or Peers.of(trainer)
    if peers is not None:
        peers.compare(what_must_agree(trainer, cli.model, cli.datamodule))
    run = agreed_run(peers, lambda: _run_directory(cli, data))
    if is_started() or not trainer.is_global_zero:  # the lock is held by the process that began
        with lost_peers(run), how_to_go_on(run):
            _train_and_test(cli, run, has_validation)
        return
    with nothing_half_written(run, new=cli.config.resume is None), claim(run.lock) as mine:
        if not mine:
            raise ConfigurationError(f"another process is training in {run.path}; wait for it, or stop it first")
        if cli.config.resume is not None:
            note_changes(cli, run)
        if trainer.world_size > 1 and not started_by_others(trainer):
            start(arguments if cli.config.resume is not None else ["--resume", str(run.path)], trainer, run)
        else:
            with lost_peers(run), how_to_go_on(run):
                _train_and_test(cli, run, has_validation)


def _checked(arguments: list[str]) -> tuple[CLI, dict]:
    """The command line and what it builds, which can be trained as far as can be known; and the record of its data."""
    cli = CLI(arguments)
    datamodule, report = cli.datamodule, cli.config.report
    data = data_record(datamodule, cli.model.kind)
    if report == "best_test":
        datamodule.select_on_test()
    datamodule.setup()  # a missing file is refused before there is a run directory
    trained = ["limit_train_batches"] if cli.model.trained_parameters() else []
    check_limits(cli, *trained, *(["limit_test_batches"] if cli.config.test else []))
    options = (cli.config_init.trainer, report, cli.config.test, cli.trainer.world_size)
    check_before_training(cli.model, datamodule, *options)
    check_stages(cli)
    return cli, data


def _train_and_test(cli: CLI, run: RunDirectory, has_validation: bool) -> None:
    task, datamodule = cli.model, cli.datamodule
    first = cli.trainer.is_global_zero  # of several processes, one writes and prints
    if first:
        print_setting(setting(task, datamodule), run.path)
    stages = train_stages(cli, run)

    cost, record = TrainingCost(), record_of(task, datamodule, cli.config.calibration_bins)
    callbacks = [cost, EpochHistory(run.metrics), record, *checkpoint_callbacks(run, has_validation, task.objective)]
    if isinstance(cli.trainer.strategy, ShardedBackbone):
        callbacks.append(EqualBatches())
    trainer = cli.build_trainer(
        [*callbacks, TrainingProgress()] if first else callbacks,
        logger=TensorBoardLogger(run.path, name="", version="tensorboard"),
        plugins=[AtomicCheckpointIO()],
        default_root_dir=run.path,
        enable_progress_bar=False,
    )
    if first:
        log_hyper_parameters(trainer.loggers, parsed(as_carried(cli.config_text(), run.carried)))
    train(trainer, task, datamodule, run, run)
    if cli.config.report == "last":
        reported = _last(trainer)
    else:
        split = "validation" if cli.config.report == "best" else "test"
        reported = f"{_load_best(task, run)} of {trainer.current_epoch}, best on the {split} split"
    if first:
        task.save(run.path / task.folder, datamodule)
    if cli.config.test:
        trainer.test(task, datamodule, verbose=False)
    if not first:
        return
    if cli.config.test:
        log_outcome(trainer, task.objective.monitor)

    results = setting(task, datamodule) | {
        **(tested(trainer, record) if cli.config.test else {}),
        "reported": reported,
        "training_seconds": round(cost.seconds + sum(each["training_seconds"] for each in stages), 2),
        "peak_memory_bytes": max([cost.peak_memory, *(each["peak_memory_bytes"] for each in stages)]),
        "memory_kind": cost.memory_kind,
        **({"earlier_stages": stages} if stages else {}),
        "precision": str(trainer.precision),
        "batch": batches(trainer, datamodule),
        "run_directory": str(run.path),
    }
    write_json(run.results, results)
    if cli.config.figures:
        _draw(run, task, record if cli.config.test else None)
    print_results(results)


def _draw(run: RunDirectory, task: ImageTask, record: Record | None) -> None:
    if history := read_history(run.metrics):
        draw_curves(history, task.objective.shown, run.path / "curves.png")
    if record is not None:
        record.draw(run.path, task.class_names)


def _run_directory(cli: CLI, data: dict) -> RunDirectory:
    """The directory of the resumed run, or a new one with the configuration and the record of the data in it."""
    if cli.config.resume is not None:
        run = RunDirectory.existing(cli.config.resume)
        check_resumed(cli, run, data)
        return run
    run = RunDirectory.create(Path(cli.config.output), f"{cli.datamodule.description()['task']}-{cli.model.label}")
    write_json(run.path / "environment.json", environment())
    write_json(run.data, data)
    if draw := getattr(cli.datamodule, "draw", None):  # which images of a few-shot set were drawn
        draw.write(run.path / "draw.json")
    text = cli.config_text()
    carry(parsed(text), run.carried)
    with replacing(run.config) as partial:  # last, as it is what makes the folder that of a run
        partial.write_text(text, encoding="utf-8")
    return run


def _last(trainer: pl.Trainer) -> str:
    """Where a training has ended."""
    if not trainer.current_epoch:
        return "without gradient steps"
    if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
        return f"last of {trainer.current_epoch} epochs"
    return f"step {trainer.global_step}, within epoch {trainer.current_epoch}"


def _load_best(task: ImageTask, run: RunDirectory) -> str:
    """Load the best checkpoint into the task and say of which epoch it is, and of which step if that was not over."""
    if not run.best_checkpoint.is_file():
        raise ConfigurationError(
            "--report best found nothing that was validated; keep what was trained last: python -m visionpeft.fit "
            f"--resume {run.path} --report last, or train longer"
        )
    checkpoint = AtomicCheckpointIO().load_checkpoint(run.best_checkpoint)
    task.on_load_checkpoint(checkpoint)
    task.load_state_dict(checkpoint["state_dict"], strict=False)
    task.choose()  # what was chosen at the end of the training was chosen for the last epoch
    epoch = f"epoch {checkpoint['epoch'] + 1}"
    return f"step {checkpoint['global_step']}, within {epoch}" if within_epoch(checkpoint) else epoch
