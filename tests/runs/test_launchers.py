"""Processes that `srun` has started, by what Slurm 22.05 tells them; no Slurm is needed for it."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from forked import start, wait
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from process_runs import alone, furthest, only_run, results
from small_runs import arguments, draw_splits

from visionpeft import evaluate, fit
from visionpeft.errors import ConfigurationError
from visionpeft.protocols import work
from visionpeft.runs import launchers
from visionpeft.runs.processes import started_by_others

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

BATCH_SCRIPT = {  # sbatch --ntasks 2
    **{"SLURM_JOB_ID": "20417", "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_TASKS_PER_NODE": "2"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"},
}


def task(rank, tasks=2, per_node="2", step="0"):
    """What srun adds to it: one of its tasks."""
    return BATCH_SCRIPT | {
        **{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": str(tasks)},
        **{"SLURM_STEP_ID": step, "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_TASKS_PER_NODE": per_node},
        **{"SLURM_STEP_NODELIST": "localhost"},
    }


@pytest.fixture
def said(monkeypatch):
    """Sets the environment of a process, whose own is put back after the test; so is Lightning's rank."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(rank_zero_only, "rank", 0)

    def said(variables, rank=0):
        os.environ.update(variables)
        rank_zero_only.rank = rank

    return said


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_splits(tmp_path_factory.mktemp("images"), train=4, val=2, test=2)


@pytest.mark.slow
def test_tasks_of_srun_train_as_one(tmp_path, images):
    """The numbers and weights of one process. Lightning by itself refuses tasks without --ntasks-per-node."""
    given = [*arguments(images), "--global_batch", "4"]
    together = [*given, "--trainer.devices", "2", "--output", str(tmp_path / "runs")]
    logs = [tmp_path / f"{rank}.txt" for rank in range(2)]
    started = [start(fit.main, together, environment=task(rank), output=logs[rank]) for rank in range(2)]
    assert [wait(child, 300) for child in started] == [0, 0], "".join(log.read_text() for log in logs)
    run = only_run(tmp_path / "runs")
    assert results(run)["batch"]["devices"] == 2
    assert furthest(run, alone(tmp_path / "one", given)) < 1e-6


def test_a_command_in_a_batch_script_is_alone(tmp_path, images):
    """Also with a job of two tasks; Lightning would wait for the second one, or refuse."""
    given = [*arguments(images), "--output", str(tmp_path / "runs")]
    child = start(fit.main, given, environment=BATCH_SCRIPT, output=tmp_path / "said.txt")
    assert wait(child, 200) == 0, (tmp_path / "said.txt").read_text()
    assert results(only_run(tmp_path / "runs"))["batch"]["devices"] == 1


def test_devices_in_a_job_of_one_task_are_started_here(said):
    """findings/lightning_halves_the_data_in_a_slurm_job_of_one_task.sh"""
    said(BATCH_SCRIPT | {"SLURM_NTASKS": "1"})
    assert pl.Trainer(devices=2, accelerator="cpu", logger=False).world_size == 1  # the negative control
    launchers.train_as_one()
    trainer = pl.Trainer(devices=2, accelerator="cpu", logger=False)
    assert trainer.world_size == 2
    assert not started_by_others(trainer)


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        ([task(0), task(1)], "give --trainer.devices 2 --trainer.num_nodes 1"),
        ([task(0, tasks=5, per_node="2(x2),1")], "1 or 2 processes of this command on a node"),
    ],
)
def test_other_numbers_are_refused(tmp_path, images, tasks, sentence):
    """Of processes that are wrong in the same way, one says so. Lightning lets two tasks train apart, and overwrite."""
    log, given = tmp_path / "said.txt", [*arguments(images), "--output", str(tmp_path / "runs")]
    started = [start(fit.main, given, environment=each, output=log) for each in tasks]
    assert [wait(child, 200) for child in started] == [2] * len(tasks)
    assert log.read_text().count(sentence) == 1
    assert "Traceback" not in log.read_text()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("step", "nodes", "per_node", "address"),
    [("0", "gpu[07-08]", "2(x2)", "gpu07"), ("3", "a1,b[2-3]", "2,2", "a1"), ("4", "n[5,9]", "4", "n5")],
)
def test_where_tasks_meet(said, step, nodes, per_node, address):
    said(task(1, tasks=4, per_node=per_node, step=step) | {"SLURM_STEP_NODELIST": nodes, "SLURM_NODEID": "0"})
    launchers.train_as_one()
    assert os.environ["MASTER_ADDR"] == address
    assert int(os.environ["MASTER_PORT"]) == 10_000 + (20417 + 997 * int(step)) % 20_000  # another for each step
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("1", "4", "1")
    assert os.environ["LOCAL_WORLD_SIZE"] == per_node[0]


def test_torchrun_under_srun_stays_as_it_is(said):
    given = task(0) | {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    said(given)
    launchers.train_as_one()
    assert {name: os.environ[name] for name in given} == given


def test_processes_that_somebody_starts_by_hand_stay_as_they_are(said):
    """As on a cluster of which Lightning knows nothing."""
    given = {"NODE_RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "20123"}
    said(given)
    launchers.train_as_one()
    assert {name: os.environ[name] for name in given} == given
    assert started_by_others(pl.Trainer(devices=1, num_nodes=2, accelerator="cpu", logger=False))


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_what_trains_apart_has_no_rank(said, launcher, tmp_path):
    """With the rank of its task it would keep no curves and draw other augmentations than the first one."""
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    said(task(1) | {"SLURM_NTASKS_PER_NODE": "2"} if launcher == "srun" else torchrun, rank=1)
    pl.seed_everything(0, workers=True, verbose=False)
    if launcher == "srun":  # the negative control
        assert SLURMEnvironment.detect()
        assert pl.Trainer(devices=1, accelerator="cpu", logger=False).world_size == 1
    assert rank_zero_only.rank == 1
    work.finish([], tmp_path)
    assert rank_zero_only.rank == 0
    trainer = pl.Trainer(devices=1, accelerator="cpu", logger=False)
    assert isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment)


def test_of_several_on_a_machine_each_takes_another_gpu(said, monkeypatch):
    def two_unless_said():
        return len(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(","))

    monkeypatch.setattr(torch.cuda, "device_count", two_unless_said)
    for rank, before, after in ((1, "4,5", "5"), (1, "7", "7"), (0, None, "0")):
        said(task(rank))
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        os.environ |= {} if before is None else {"CUDA_VISIBLE_DEVICES": before}
        launchers.be_alone()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == after
    said({"CUDA_VISIBLE_DEVICES": "4,5"})  # alone, it has all
    launchers.be_alone()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_several_processes_of_another_command_are_refused(said, capsys, launcher):
    said(task(0) if launcher == "srun" else {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2"})
    assert evaluate.main(["runs/none"]) == 2
    assert f"{launcher} has started 2 processes of this command" in capsys.readouterr().err
    with pytest.raises(ConfigurationError):
        launchers.refuse_several()


@pytest.mark.slow
def test_the_signal_before_the_end_of_a_job(tmp_path, images):
    """`--signal USR1@120` of sbatch, by which jobs are told by custom, ends a training as SIGTERM does."""
    given = [*arguments(images, epochs=500), "--output", str(tmp_path / "runs")]
    child = start(fit.main, given, environment=BATCH_SCRIPT, output=tmp_path / "said.txt")
    deadline = time.monotonic() + 120
    while not any(len(path.read_text().splitlines()) > 2 for path in tmp_path.glob("runs/*/metrics.csv")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child, signal.SIGUSR1)
    assert wait(child, 60) == 130
    told = (tmp_path / "said.txt").read_text()
    assert re.search(r"interrupted in epoch \d+ of 500; finished epochs are kept", told)


def test_the_script_for_slurm_puts_an_interrupted_job_into_the_queue_again(tmp_path):
    """`examples/slurm.sh` with programs in the place of srun, which is interrupted once, and scontrol."""
    programs = {
        "srun": 'echo "$@" >> srun.txt; mkdir -p runs/job-7/photos-LoRA-1; touch runs/job-7/photos-LoRA-1/config.yaml\n'
        "[ $(wc -l < srun.txt) -gt 1 ] || exit 130",
        "scontrol": 'echo "$@" >> scontrol.txt',
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    script = Path(__file__).parents[2] / "examples/slurm.sh"
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
    environment = os.environ | job | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", str(script), "--config", "images_lora.yaml", "--data.root", "my photos"]
    codes = [subprocess.run(command, cwd=tmp_path, env=environment).returncode for _ in range(2)]
    assert codes == [130, 0]
    devices = "--trainer.devices 4 --trainer.num_nodes 2"
    assert (tmp_path / "srun.txt").read_text().splitlines() == [
        f"python -m visionpeft.fit --config images_lora.yaml --data.root my photos --output runs/job-7 {devices}",
        f"python -m visionpeft.fit --resume runs/job-7/photos-LoRA-1 {devices}",
    ]
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 7\n"
