"""Several processes train as one: with the same global batch they have the numbers and the weights of one process."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from forked import start, start_together, wait
from process_runs import alone, furthest, only_run, results, together
from small_learner_runs import learner_arguments
from small_runs import arguments, draw_splits
from small_video_runs import draw_videos, video_arguments

from visionpeft import fit
from visionpeft.data.ordering import ShareSampler
from visionpeft.runs.command import PeerLost
from visionpeft.runs.processes import lost_peers, what_became_of_peers
from visionpeft.sharing.run_directory import RunDirectory

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 images to train on, 9 to select on and 9 to test: an odd number, so that two shares are not equal."""
    return draw_splits(tmp_path_factory.mktemp("images"), train=8, val=3, test=3)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for split, per_class in (("train", 4), ("test", 1)):
        draw_videos(root / split, per_class)
    return root


TASKS = {
    "images": lambda images, videos: [*arguments(images)],
    "a method that sees data first": lambda images, videos: [*arguments(images), "--model.method", "SPT"],
    "learner": lambda images, videos: [*learner_arguments(images / "train"), "--model.optimisation.lr", "0.002"],
    "features that are fitted first": lambda images, videos: [
        *learner_arguments(images / "train", learner="TipAdapter", epochs=1),
        *("--model.learner.train_keys", "true", "--model.optimisation.lr", "0.002"),
    ],
    "a kept trunk": lambda images, videos: [
        *arguments(images, epochs=1),
        *("--model.method.blocks", "last:1", "--model.cache", "memory", "--data.augmentation", "none"),
    ],
    "videos": lambda images, videos: video_arguments(videos),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_two_processes_are_as_one(tmp_path, images, videos, task):
    """Losses, accuracies and weights to 1e-6; every test image is counted once."""
    given = [*TASKS[task](images, videos), "--global_batch", "4"]
    two, one = together(tmp_path / "two", given), alone(tmp_path / "one", given)
    assert furthest(two, one) < 1e-6
    assert results(two)["batch"] == {"devices": 2, "batch_size": 2, "accumulated": 1, "global_batch": 4}
    assert results(one)["batch"] == {"devices": 1, "batch_size": 4, "accumulated": 1, "global_batch": 4}
    assert results(two)["data"] == results(one)["data"]
    if task == "images":  # the negative control: another global batch is another training
        other = together(tmp_path / "other", arguments(images, "--data.batch_size", "4"))
        assert results(other)["batch"]["global_batch"] == 8
        assert furthest(other, together(tmp_path / "again", arguments(images, "--data.batch_size", "4"))) == 0
        assert results(other)["test"]["loss"] != pytest.approx(results(one)["test"]["loss"], abs=1e-4)


def test_every_sample_is_in_one_share():
    for processes in (2, 3, 5):
        shares = [list(ShareSampler(range(11), processes, rank)) for rank in range(processes)]
        assert sorted(index for share in shares for index in share) == list(range(11))
        assert [len(ShareSampler(range(11), processes, rank)) for rank in range(processes)] == list(map(len, shares))
    # the negative control: what PyTorch's sampler does to numbers
    repeated = [torch.utils.data.DistributedSampler(range(11), 2, rank, shuffle=False) for rank in range(2)]
    assert sum(len(list(each)) for each in repeated) == 12


@pytest.mark.slow
def test_a_killed_run_goes_on_with_another_number_of_devices(tmp_path, images):
    given = [*arguments(images, epochs=6), "--global_batch", "4"]
    options = ["--trainer.devices", "2", "--output", str(tmp_path / "two" / "runs")]
    started = start_together(tmp_path / "two", fit.main, [*given, *options])
    deadline = time.monotonic() + 120
    while not any(len(path.read_text().splitlines()) > 2 for path in tmp_path.glob("two/runs/*/metrics.csv")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(started[1], signal.SIGKILL)
    assert wait(started[1]) == -signal.SIGKILL
    assert wait(started[0], 60) == 2  # it does not wait for ever
    said = (tmp_path / "two" / "0.txt").read_text()
    run = only_run(tmp_path / "two" / "runs")
    assert "another process of this training has ended" in said
    assert f"--resume {run}" in said
    assert "Traceback" not in said
    assert not (run / "results.json").exists()
    assert fit.main(["--resume", str(run), "--trainer.devices", "1"]) == 0
    assert furthest(run, alone(tmp_path / "one", given)) < 1e-6


SAID = {  # by torch 2.14, where a process was killed, was slow, or another program had the port
    "[/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:19868. This is typically": "has ended",
    "[/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:35035: Connection reset by peer. This is": "has ended",
    "[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation": "does not answer",
    "[enforce fail at /gloo/transport/tcp/pair.cc:464] op.preamble.length <= op.nbytes. 500000 vs 1000.": None,
    "size mismatch, m1: [4 x 3], m2: [2 x 5]; Connection closed by peer": None,
}
SAID_BY_STORE = {
    "Broken pipe": "has ended",
    "wait timeout after 2000ms, keys: /zz": "does not answer",
    "The server socket has failed to listen on any local network address. port: 1, name: EADDRINUSE": None,
    "The client socket has timed out after 2000ms while trying to connect to (localhost, 1).": None,
}


def test_errors_that_say_nothing_of_another_process_stay_what_they_are(tmp_path):
    for text, what in SAID.items():
        assert what_became_of_peers(RuntimeError(text)) == what, text
    for text, what in SAID_BY_STORE.items():
        assert what_became_of_peers(torch.distributed.DistNetworkError(text)) == what, text
    run = RunDirectory(tmp_path)
    with pytest.raises(torch.distributed.DistNetworkError, match="EADDRINUSE"), lost_peers(run):
        raise torch.distributed.DistNetworkError(list(SAID_BY_STORE)[2])
    with pytest.raises(PeerLost, match=f"does not answer; .*--resume {tmp_path}"), lost_peers(run):
        raise RuntimeError(list(SAID)[2])


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks processes up as Linux lists them")
def test_a_process_that_is_killed_ends_the_others(tmp_path, images):
    """`--trainer.devices 2` starts the processes itself, and says in one sentence which of them ended."""
    given = [*arguments(images, epochs=1000), "--trainer.devices", "2", "--output", str(tmp_path / "runs")]
    began = start(fit.main, given, output=tmp_path / "said.txt")
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("runs/*/metrics.csv")):
        assert time.monotonic() < deadline, (tmp_path / "said.txt").read_text()
        time.sleep(0.1)
    (second,) = (child for child in children(began) if b"LOCAL_RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes())
    os.kill(second, signal.SIGKILL)
    assert wait(began, 60) == 2
    run = only_run(tmp_path / "runs")
    errors = [line for line in (tmp_path / "said.txt").read_text().splitlines() if line.startswith("error")]
    assert errors == [
        "error: process 2 of 2 ended with signal SIGKILL, and the others were stopped; finished epochs are kept. "
        f"Continue with: python -m visionpeft.fit --resume {run}"
    ]
    assert (run / "checkpoints" / "last.ckpt").is_file()


REFUSED = {
    "more processes than cores": (["--trainer.devices", "999"], "CPU cores"),
    "several machines": (["--trainer.devices", "2", "--trainer.num_nodes", "2"], "start this command on every machine"),
    "sharded": (["--trainer.devices", "2", "--trainer.strategy", "fsdp"], "requires a GPU"),
    "one process for several devices": (["--trainer.devices", "2", "--trainer.strategy", "ddp_spawn"], "with ddp"),
    "uneven": (["--trainer.devices", "2", "--global_batch", "5"], "use a multiple of 2"),
    "no batch": (["--global_batch", "0"], "use a multiple of 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_at_once(tmp_path, images, capsys, case):
    options, words = REFUSED[case]
    assert fit.main([*arguments(images), *options, "--output", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_fewer_images_than_devices(tmp_path, images, capsys):
    options = ["--trainer.devices", "2", "--data.test_samples", "1", "--output", str(tmp_path / "runs")]
    assert fit.main([*arguments(images), *options]) == 2
    assert "1 test images cannot be shared by 2 devices" in capsys.readouterr().err


def test_nothing_to_train(tmp_path, images, capsys):
    options = ["--trainer.devices", "2", "--output", str(tmp_path / "runs")]
    assert fit.main([*learner_arguments(images / "train", learner="ZeroShot"), *options]) == 2
    assert "ZeroShot trains nothing by gradient steps" in capsys.readouterr().err
