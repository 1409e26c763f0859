"""Runs on streams: from the command line, on two devices, and what is refused before there is a run directory."""

import json

import pytest
import torch
from forked import start_together, wait
from shards_of_images import CLASSES, of_pixels, png, write_tar
from small_learner_runs import CLIP
from small_runs import BACKBONE, draw_images, watched_steps

from visionpeft import evaluate, fit, predict

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """24 coloured squares to train on, 9 to select on, 11 to test, in shards of different sizes."""
    folder = tmp_path_factory.mktemp("shards")
    photos = draw_images(tmp_path_factory.mktemp("photos") / "all", 15)
    files = {name: [path.read_bytes() for path in sorted((photos / name).iterdir())] for name in CLASSES}
    number = 0
    for split, sizes in (("train", (12, 12)), ("val", (5, 4)), ("test", (8, 2, 1))):
        for shard, size in enumerate(sizes):
            content = {}
            for each in range(number, number + size):
                name = CLASSES[each % 3]
                content |= {f"{each:03}.png": files[name][each // 3], f"{each:03}.cls": str(each % 3).encode()}
            write_tar(folder / f"{split}-{shard}.tar", content)
            number += size
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    return folder


def data_of(shards, *more):
    return [
        *("--data", "StreamedImages", "--data.source", "wds", "--data.root", str(shards), "--data.batch_size", "4"),
        *("--data.train", "train-{0..1}.tar|24", "--data.val", "val-{0..1}.tar", "--data.test", "test-{0..2}.tar"),
        *("--data.class_names", str(shards / "classes.txt")),
        *more,
    ]


def arguments(shards, *more, epochs=3):
    return [
        *("--config", "images_lora.yaml", *BACKBONE, "--model.optimisation.warmup_epochs", "1", "--figures", "false"),
        *("--trainer.max_epochs", str(epochs), "--trainer.accelerator", "cpu"),
        *data_of(shards),
        *more,
    ]


def only_run(folder):
    (run,) = (path for path in folder.iterdir() if path.is_dir())
    return run


def results(run):
    return json.loads((run / "results.json").read_text())


def test_a_stream_that_ended_within_an_epoch_goes_on_with_the_very_next_image(tmp_path, shards):
    """It began the epoch again, because Lightning had made its loader before it read the checkpoint."""
    with watched_steps() as whole:
        assert fit.main([*arguments(shards, epochs=2), "--output", str(tmp_path / "whole")]) == 0
    given = ("--trainer.max_steps", "8", "--output", str(tmp_path / "part"))
    assert fit.main([*arguments(shards, *given, epochs=2)]) == 0
    with watched_steps() as rest:
        assert fit.main(["--resume", str(only_run(tmp_path / "part")), "--trainer.max_steps", "-1"]) == 0
    assert rest == whole[8:]


@pytest.mark.slow
def test_two_devices(tmp_path, shards, capsys):
    """Each test image counts once: one process finds the same numbers with the same weights.

    The two devices share two val shards of 5 and 4 images; of the three test shards, each takes every second image.
    """
    options = ["--trainer.devices", "2", "--output", str(tmp_path / "runs"), "--report", "last"]
    given = [*arguments(shards, epochs=2), *options]
    started = start_together(tmp_path / "said", fit.main, given)
    codes = [wait(child, 300) for child in started]
    assert codes == [0, 0], "".join(path.read_text() for path in tmp_path.glob("said/*.txt"))
    run = only_run(tmp_path / "runs")
    two = results(run)
    assert two["batch"] == {"devices": 2, "batch_size": 4, "accumulated": 1, "global_batch": 8}
    assert two["data"]["sizes"] == {"train": 24, "val": None, "test": None}
    assert sum(two["calibration"]["counts"]) == 11
    steps = (run / "metrics.csv").read_text().splitlines()
    assert len(steps) == 3  # a header and an epoch a line

    assert evaluate.main([str(run), "--trainer.devices", "1"]) == 0
    one = json.loads((run / "evaluation.json").read_text())
    assert one["data"]["sizes"] == {"train": 24, "val": None, "test": 11}
    assert one["test"].keys() == two["test"].keys()
    for name, value in one["test"].items():
        assert two["test"][name] == pytest.approx(value, abs=1e-6), name
    assert one["calibration"]["counts"] == two["calibration"]["counts"]
    # the negative control: an image twice is another loss
    twice = [str(run), "--trainer.devices", "1", "--data.test", "test-{0..2}.tar::test-2.tar"]
    assert evaluate.main(twice) == 0
    other = json.loads((run / "evaluation.json").read_text())
    assert sum(other["calibration"]["counts"]) == 12
    assert other["test"]["loss"] != pytest.approx(two["test"]["loss"], abs=1e-6)

    capsys.readouterr()
    (tmp_path / "red.png").write_bytes(of_pixels(torch.tensor([[[255, 0, 0]]]).byte().expand(32, 32, 3).numpy()))
    assert predict.main([str(run), str(tmp_path / "red.png"), "--output", str(tmp_path / "said.json")]) == 0
    (predicted,) = json.loads((tmp_path / "said.json").read_text())
    assert sorted(predicted["classes"]) == CLASSES


@pytest.mark.slow
def test_a_learner_on_a_clip(tmp_path, shards, capsys):
    """CoOp learns from a stream, whose classes have names; a learner that is fitted on all images is refused."""
    given = [
        *("--model", "PromptLearning", *CLIP, "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"),
        *("--figures", "false", *data_of(shards), "--output", str(tmp_path / "runs")),
    ]
    assert fit.main([*given, "--model.learner", "CoOp"]) == 0
    assert results(only_run(tmp_path / "runs"))["data"]["sizes"]["test"] == 11
    assert "11" in capsys.readouterr().out
    refused = [*given, "--model.learner", "TipAdapter", "--output", str(tmp_path / "more")]
    assert fit.main(refused) == 2
    assert "TipAdapter is fitted on the features of all images before training" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


REFUSED = {
    "a shard that is missing": (["--data.train", "train-{0..2}.tar|24"], "train-2.tar does not exist"),
    "a number that is not known": (["--data.train", "train-{0..1}.tar"], "--data.num_samples '{train: 50000}'"),
    "no such split": (["--data.val", "validation"], "there is no split 'validation'"),
    "no split to select on": (["--data.val", "null"], "give --data.val with the name of one"),
    "no test": (["--data.test", "null"], "give --data.test with the name of one"),
    "balanced weights": (["--model.class_weights", "balanced"], "nothing can be balanced by them before"),
    "cache": (["--model.cache", "memory", "--model.method.blocks", "last:1"], "cache looks images up again"),
    "a command": (["--data.test", "pipe:cat x.tar"], "is a command, which is not run"),
    "few images": (["--data.num_samples.train", "1", "--trainer.devices", "2"], "1 train images cannot be shared by 2"),
    "no source": (["--data.source", "webdataset"], "there is no source 'webdataset'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_at_once(tmp_path, shards, capsys, case):
    options, words = REFUSED[case]
    assert fit.main([*arguments(shards), *options, "--output", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_what_is_met_in_the_middle(tmp_path, shards, capsys):
    """A label beyond the classes in the last shard stops the run with one sentence."""
    write_tar(tmp_path / "train-9.tar", {"0.png": png(1, 32), "0.cls": b"7"})
    options = ["--data.train", f"train-{{0..1}}.tar::{tmp_path}/train-9.tar|25", "--output", str(tmp_path / "runs")]
    assert fit.main([*arguments(shards, epochs=1), *options]) == 2
    said = capsys.readouterr().err
    assert "error: '0' in shard" in said
    assert "label '7' is out of range; class_names allows 0 to 2" in said
    assert "Traceback" not in said
