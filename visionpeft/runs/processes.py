"""Several processes that train as one: how they are started, and what they agree on.

`--trainer.devices N` starts N processes of the same command under PyTorch's elastic agent, the one of `torchrun`. This
process then trains nothing: it has checked everything, made the run directory and holds its lock, and it says in
one sentence which process ended and why. Processes that somebody else starts (torchrun, srun) find each other over the
network, and the first of them makes the run directory for all.
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from torch.distributed import DistError

from visionpeft.errors import ConfigurationError, UserError
from visionpeft.runs.agreement import Peers
from visionpeft.runs.command import RUN, Interrupted, PeerLost, is_started
from visionpeft.runs.environment import usable_cores
from visionpeft.sharing.run_directory import RunDirectory

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


# What the network says of a connection whose other end is gone.
CLOSED = ("closed by peer", "reset by peer", "broken pipe", "connection was likely closed", "remote process exited")


class TrainingEnded(UserError):
    """One of the processes of a training ended before its end; the message says how to go on."""


def check_devices(trainer: pl.Trainer) -> None:
    """Refuse more processes than this machine can run, and several machines of which nobody starts the processes.

    Raises:
        ConfigurationError: so it is.
    """
    _check_started(trainer)
    if trainer.world_size == 1:
        return
    cores = usable_cores()
    if trainer.strategy.root_device.type == "cpu" and trainer.num_devices > cores:
        raise ConfigurationError(
            f"--trainer.devices {trainer.num_devices}: {cores} CPU cores may be used here, and each process needs one; "
            f"use at most {cores}"
        )
    if trainer.num_nodes > 1 and not started_by_others(trainer):
        raise ConfigurationError(
            f"--trainer.num_nodes {trainer.num_nodes}: start this command on every machine with torchrun --nnodes "
            f"{trainer.num_nodes} --nproc-per-node {trainer.num_devices} ..., or with srun"
        )
    if not isinstance(trainer.strategy, DDPStrategy) or trainer.strategy._start_method != "popen":
        raise ConfigurationError(
            f"{type(trainer.strategy).__name__} is not among what this command trains with: several devices train with "
            "ddp, which keeps a whole backbone on each (leave --trainer.strategy out), or with fsdp2, which shards it"
        )


def _check_started(trainer: pl.Trainer) -> None:
    """Refuse other numbers of devices and machines than `torchrun` has started processes for.

    Raises:
        ConfigurationError: so it is.
    """
    if not TorchElasticEnvironment.detect():
        return
    # With one device each process would train by itself: findings/lightning_trains_apart_under_torchrun.sh
    processes = int(os.environ["WORLD_SIZE"])
    here = int(os.environ.get("LOCAL_WORLD_SIZE", trainer.num_devices))
    if (processes, here) != (trainer.num_devices * trainer.num_nodes, trainer.num_devices):
        raise ConfigurationError(
            f"{processes} processes were started, {here} of them on this machine, and --trainer.devices "
            f"{trainer.num_devices} with --trainer.num_nodes {trainer.num_nodes} make {trainer.num_devices} x "
            f"{trainer.num_nodes}; give --trainer.devices {here} --trainer.num_nodes {max(1, processes // here)}"
        )


def share_of_batch(global_batch: int, trainer: pl.Trainer) -> int:
    """Images of one step on one device.

    Raises:
        ConfigurationError: they cannot be shared evenly.
    """
    parts = trainer.world_size * trainer.accumulate_grad_batches
    if global_batch < 1 or global_batch % parts:
        raise ConfigurationError(
            f"--global_batch {global_batch} cannot be shared by {trainer.world_size} devices with "
            f"{trainer.accumulate_grad_batches} batches a step; use a multiple of {parts}"
        )
    return global_batch // parts


def started_by_others(trainer: pl.Trainer) -> bool:
    """Whether this is one of several processes that another program, or this command, has started."""
    return isinstance(trainer.strategy, ParallelStrategy) and (
        trainer.strategy.cluster_environment.creates_processes_externally
    )


def agreed_run(peers: Peers | None, make: Callable[[], RunDirectory]) -> RunDirectory:
    """The run directory of all processes, made by the first of them.

    Args:
        peers: these processes; None if this one is alone, or starts them.
        make: makes it, or finds that of the run to resume.

    Raises:
        UserError: none can be made; of several processes the first says so, and all end.
    """
    if is_started():
        return RunDirectory(Path(os.environ[RUN]))
    return make() if peers is None else RunDirectory(Path(peers.first_does(lambda: str(make().path))))


def start(arguments: list[str], trainer: pl.Trainer, run: RunDirectory) -> None:
    """Run the command line in as many processes as the trainer has devices, and wait for them.

    Args:
        arguments: the command line without the program's name.
        trainer: says how many.
        run: the directory in which they train.

    Raises:
        TrainingEnded: a process failed, or was ended.
        Interrupted: this process was asked to end.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ[RUN] = str(run.path)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=trainer.num_devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
    )
    command = ["-m", "visionpeft.fit", *arguments]
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        raise TrainingEnded(_why(error.failures, trainer.num_devices, run)) from None
    except SignalException:
        raise Interrupted(
            f"interrupted; finished epochs are kept. Continue with: python -m visionpeft.fit --resume {run.path}"
        ) from None
    finally:
        del os.environ[RUN]


@contextmanager
def lost_peers(run: RunDirectory) -> Iterator[None]:
    """Say that another process is gone, or hangs, where the network says so; any other error stays what it is.

    Raises:
        PeerLost: so it is.
    """
    try:
        yield
    except RuntimeError as error:
        what = what_became_of_peers(error)
        if what is None:
            raise
        raise PeerLost(
            f"another process of this training {what}; finished epochs are kept. Continue with: "
            f"python -m visionpeft.fit --resume {run.path}"
        ) from error


def what_became_of_peers(error: RuntimeError) -> str | None:
    """What an error of the network says of another process, None if it says nothing of one.

    The class does not tell: Gloo raises a plain `RuntimeError`, and a `DistError` may as well be a port in use or an
    operation that a backend does not know. So it is read in the text, as of torch 2 and NCCL 2.
    """
    said = str(error).lower()
    if not (isinstance(error, DistError) or "gloo" in said):
        return None
    if any(each in said for each in CLOSED):
        return "has ended"
    if "timed out" in said or "timeout" in said:
        return None if "while trying to connect" in said else "does not answer"
    return None


def _why(failures: dict[int, "ProcessFailure"], processes: int, run: RunDirectory) -> str:
    """What the process that failed first said itself; if it could not, how it ended and how to go on."""
    said = [failure for failure in failures.values() if Path(failure.error_file).is_file()]
    if said:
        return min(said, key=lambda failure: failure.timestamp).message
    # One that a signal ended did not end because of the others, unless by the signal with which the agent stops them.
    stopped = -signal.SIGTERM
    rank, failure = min(failures.items(), key=lambda item: (item[1].exitcode > 0, item[1].exitcode == stopped, item[0]))
    ended = f"signal {failure.signal_name()}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    return (
        f"process {rank + 1} of {processes} ended with {ended}, and the others were stopped; finished epochs are kept. "
        f"Continue with: python -m visionpeft.fit --resume {run.path}"
    )
