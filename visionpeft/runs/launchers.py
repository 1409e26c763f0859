"""What a launcher has told this process: that of `torchrun`, or of `srun` in a Slurm job.

Lightning asks the environment, when it is imported and in each Trainer, and takes it at its word. In a job of several
tasks it waits for processes that nobody has started, where the command stands in the batch script alone; in a job of
one task two devices train on half of the data (`findings/lightning_halves_the_data_in_a_slurm_job_of_one_task.sh`);
tasks that train apart have ranks all the same, so that all but the first keep no curves and draw other augmentations.
So each command says what several processes of it are, before it imports Lightning: one training (`train_as_one`), each
by itself (`be_alone`), or a mistake (`refuse_several`).
"""

import os
import re
import signal
import sys
from dataclasses import dataclass

from visionpeft.errors import ConfigurationError

# By these, processes that torchrun has started know each other, and those of srun are taken for such.
RANK, PROCESSES, LOCAL_RANK, LOCAL_PROCESSES = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
NODE, ADDRESS, PORT, TOGETHER = "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"
TASKS, TASK, LOCAL_TASK = "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"
OF_SLURM = (TASKS, TASK, "SLURM_NTASKS")  # by which Lightning knows it
OF_TORCHRUN = (RANK, PROCESSES, LOCAL_RANK, LOCAL_PROCESSES, NODE, TOGETHER)


@dataclass(frozen=True)
class Launch:
    """Several processes of one command, as one of them sees it.

    Args:
        by: the launcher.
        processes: how many there are.
        local_rank: which of those on this machine this one is.
        local_processes: how many those are; one number for all machines if that is so.
    """

    by: str
    processes: int
    local_rank: int
    local_processes: list[int]


def launch() -> Launch | None:
    """How this process was started with others, None if it was not."""
    said = os.environ
    if TOGETHER in said and int(said.get(PROCESSES, 1)) > 1:
        here = int(said.get(LOCAL_PROCESSES, said[PROCESSES]))
        return Launch("torchrun", int(said[PROCESSES]), int(said.get(LOCAL_RANK, 0)), [here])
    if TOGETHER not in said and int(said.get(TASKS, 1)) > 1:  # a batch script has the tasks of its job, and no step
        each = re.findall(r"\d+(?=\(|,|$)", said.get("SLURM_STEP_TASKS_PER_NODE", said[TASKS]))  # "2(x3),1"
        return Launch("srun", int(said[TASKS]), int(said.get(LOCAL_TASK, 0)), sorted({int(count) for count in each}))
    return None


def train_as_one() -> None:
    """Let tasks that `srun` has started find each other as those of `torchrun` do.

    They meet on the first node of the step, at a port that follows from the numbers of the job and the step, so that
    several steps of a job may train at the same time; MASTER_ADDR and MASTER_PORT are kept where they are given.

    Raises:
        ConfigurationError: the nodes have unlike numbers of tasks.
    """
    if "SLURM_JOB_ID" in os.environ:  # by custom, a job is told of its end by this signal
        signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(signal.SIGTERM))
    started = launch()
    if started is None:
        _forget(OF_SLURM)
        return
    if started.by == "torchrun":
        return
    if len(started.local_processes) > 1:
        raise ConfigurationError(
            f"srun has started {' or '.join(map(str, started.local_processes))} processes of this command on a node; a "
            "training takes the same number on each: srun --nodes N --ntasks-per-node M"
        )
    said = os.environ
    job, step = int(said.get("SLURM_JOB_ID", 0)), int(said.get("SLURM_STEP_ID", 0))
    said.setdefault(PORT, str(10_000 + (job + 997 * step) % 20_000))  # below those that systems give by themselves
    said |= {
        TOGETHER: f"slurm-{job}.{step}",
        RANK: said[TASK],
        PROCESSES: said[TASKS],
        LOCAL_RANK: said[LOCAL_TASK],
        LOCAL_PROCESSES: str(started.local_processes[0]),
        NODE: said.get("SLURM_NODEID", "0"),
    }
    if ADDRESS not in said:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        said[ADDRESS] = SLURMEnvironment.resolve_root_node_address(said["SLURM_STEP_NODELIST"])


def be_alone() -> None:
    """Let this process train by itself, whatever was started with it; of several on a machine each has another GPU."""
    started = launch()
    if started is not None and max(started.local_processes) > 1:
        take_gpu(started.local_rank)
    _forget((*OF_SLURM, *OF_TORCHRUN))
    if "lightning_utilities" in sys.modules:  # it has read the rank when it was imported
        from lightning_utilities.core.rank_zero import rank_zero_only

        rank_zero_only.rank = 0


def refuse_several() -> None:
    """Refuse to be one of several processes, each of which would do the same and write the same files.

    Raises:
        ConfigurationError: it is one.
    """
    started = launch()
    if started is not None:
        raise ConfigurationError(
            f"{started.by} has started {started.processes} processes of this command, each of which would do the same; "
            f"start one{', with srun --ntasks 1' if started.by == 'srun' else ''}"
        )
    be_alone()


def _forget(names: tuple[str, ...]) -> None:
    for name in names:
        os.environ.pop(name, None)


def take_gpu(number: int) -> None:
    """See one of the GPUs that this process sees, in turn."""
    import torch

    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if count := torch.cuda.device_count():
        names = before.split(",") if before else [str(index) for index in range(count)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[number % len(names)]
