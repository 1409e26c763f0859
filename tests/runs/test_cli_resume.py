"""Interrupted runs: an error, kill -9, Ctrl-C; resuming gives what the uninterrupted run gives."""

import os
import shutil
import signal
import time
from contextlib import chdir

import pytest
import torch
from forked import start, wait
from small_runs import arguments, configure, draw_images, results, run, watched_steps

from visionpeft import fit
from visionpeft.runs.history import EpochHistory, read_history
from visionpeft.tasks import ImageClassification

DROPOUT = ["--model.method", "VPT", "--model.method.num_tokens", "2", "--model.method.dropout", "0.3"]
MIXED = [*DROPOUT, "--model.mixup", "0.4", "--model.head", "batchnorm_linear"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("data") / "squares")


def without_seconds(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def test_resumed_run_equals_uninterrupted(tmp_path, images, monkeypatch):
    whole = run(tmp_path / "whole", images, *MIXED, epochs=5)

    def fail_in_third_epoch(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise ZeroDivisionError
        return original(self, trainer, pl_module)

    original = EpochHistory.on_train_epoch_end
    with monkeypatch.context() as patch:
        patch.setattr(EpochHistory, "on_train_epoch_end", fail_in_third_epoch)
        with pytest.raises(ZeroDivisionError):
            fit.main([*arguments(images, *MIXED, epochs=5), "--output", str(tmp_path / "parts")])
    (part,) = (tmp_path / "parts").iterdir()
    assert not (part / "results.json").exists()
    assert fit.main(["--resume", str(part)]) == 0
    assert without_seconds(read_history(part / "metrics.csv")) == without_seconds(read_history(whole / "metrics.csv"))
    assert results(part)["test"] == results(whole)["test"]


def test_a_training_that_ended_within_an_epoch_goes_on_there(tmp_path, images):
    """Lightning 2.6.6 went on with the first images of the next epoch, left another epoch out, and at rate 0 at first.

    So ends a training by --trainer.max_steps, by max_time and by early stopping.
    """
    with watched_steps() as whole:
        run(tmp_path / "whole", images, epochs=3)
    assert [epoch for epoch, *_ in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    made = run(tmp_path / "part", images, "--trainer.max_steps", "5", "--report", "last", epochs=3)
    assert results(made)["reported"] == "step 5, within epoch 2"
    assert fit.main(["--resume", str(made)]) == 0  # it has ended: nothing changes
    assert results(made)["reported"] == "step 5, within epoch 2"
    with watched_steps() as rest:
        assert fit.main(["--resume", str(made), "--trainer.max_steps", "-1"]) == 0
    assert rest == whole[5:]
    assert results(made)["reported"] == "last of 3 epochs"
    history = read_history(made / "metrics.csv")
    assert [(row["epoch"], row["step"]) for row in history] == [(0, 3), (1, 6), (2, 9)]
    assert all(row["seconds"] < 60 for row in history)  # not those since the machine was started


def test_a_training_that_goes_on_longer_begins_with_the_rates_of_the_longer_one(tmp_path, images):
    """Its first step had the last rate of the training that had ended: 0."""
    with watched_steps() as whole:
        run(tmp_path / "whole", images, epochs=3)
    made = run(tmp_path / "part", images, epochs=2)
    with watched_steps() as rest:
        assert fit.main(["--resume", str(made), "--trainer.max_epochs", "3"]) == 0
    assert rest == whole[6:]


def test_the_best_that_is_within_an_epoch_is_named_so(tmp_path, images):
    """With a rate of 0 all validations are equal, and the first is the best."""
    given = ("--model.optimisation.lr", "0", "--trainer.val_check_interval", "0.34")
    made = run(tmp_path, images, *given, epochs=2)
    assert results(made)["reported"] == "step 1, within epoch 1 of 2, best on the validation split"


def test_numbers_of_an_epoch_that_is_not_validated_are_not_those_of_another(tmp_path, images, capsys):
    run(tmp_path, images, "--trainer.check_val_every_n_epoch", "2", epochs=3)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert ["; val " in line for line in lines] == [False, True, False]


def test_resuming_a_finished_run_changes_nothing(tmp_path, images):
    made = run(tmp_path, images, epochs=2)
    before = results(made)
    assert fit.main(["--resume", str(made)]) == 0
    assert results(made)["test"] == before["test"]
    assert 0 < results(made)["training_seconds"] <= before["training_seconds"]  # as of the checkpoint
    assert len(read_history(made / "metrics.csv")) == 2


@pytest.mark.parametrize("move", ["rename", "copy"])
def test_moved_run_still_knows_its_best_epoch(tmp_path, images, monkeypatch, move):
    """The second of five epochs is the best. Resumed elsewhere after the third, it is still the one that is reported.

    Lightning would take the fourth, which is better than the fifth, because it forgets scores when a folder moves.
    """
    scores = [0.2, 0.9, 0.4, 0.5, 0.3]

    def scored(self, batch, batch_idx):
        self.log_dict({"val/loss": 1.0, "val/top1": scores[self.current_epoch]}, batch_size=len(batch[1]))

    def fail_in_fourth_epoch(self, trainer, pl_module):
        if trainer.current_epoch == 3:
            raise ZeroDivisionError
        return original(self, trainer, pl_module)

    original = EpochHistory.on_train_epoch_end
    monkeypatch.setattr(ImageClassification, "validation_step", scored)
    with monkeypatch.context() as patch:
        patch.setattr(EpochHistory, "on_train_epoch_end", fail_in_fourth_epoch)
        with pytest.raises(ZeroDivisionError):
            fit.main([*arguments(images, "--report", "best", epochs=5), "--output", str(tmp_path / "before")])
    (part,) = (tmp_path / "before").iterdir()
    second = torch.load(part / "checkpoints" / "best.ckpt", weights_only=True)
    assert second["epoch"] == 1
    moved = tmp_path / "after" / "elsewhere"
    moved.parent.mkdir()
    if move == "rename":
        part.rename(moved)
    else:
        shutil.copytree(part, moved)
    assert fit.main(["--resume", str(moved)]) == 0
    assert results(moved)["reported"] == "epoch 2 of 5, best on the validation split"
    best = torch.load(moved / "checkpoints" / "best.ckpt", weights_only=True)
    assert all(torch.equal(best["state_dict"][key], value) for key, value in second["state_dict"].items())
    if move == "copy":  # the files of the original are not touched
        assert torch.load(part / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] == 1
        assert torch.load(part / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 2


def test_resuming_with_another_method_is_refused(tmp_path, images, capsys):
    made = run(tmp_path, images, epochs=1)
    assert fit.main(["--resume", str(made), "--model.method", "BitFit"]) == 2
    assert "--model.method BitFit cannot be changed while" in capsys.readouterr().err
    assert fit.main(["--resume", str(made), "--model.method", "visionpeft.methods.lora.LoRA"]) == 0  # the same
    configure(made, {"class_path": "BitFit"})
    assert fit.main(["--resume", str(made)]) == 2
    assert "does not belong to this method" in capsys.readouterr().err


def test_loss_that_is_not_a_number(tmp_path, images, monkeypatch, capsys):
    forward = ImageClassification.forward

    def diverging(self, batch):
        return forward(self, batch) * (float("nan") if self.training and self.current_epoch == 2 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(ImageClassification, "forward", diverging)
        assert fit.main([*arguments(images, epochs=4), "--output", str(tmp_path)]) == 2
    (made,) = tmp_path.iterdir()
    said = capsys.readouterr().err
    assert "the training loss became nan in epoch 3, step 7; lower the learning rate" in said
    assert f"--resume {made} --model.optimisation.lr ... goes on with another rate" in said
    checkpoint = torch.load(made / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 1
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert fit.main(["--resume", str(made)]) == 0


def test_a_loss_that_is_no_number_in_the_first_epoch(tmp_path, images, monkeypatch, capsys):
    """The run stays, so that it can be looked at, and no checkpoint is said to be in it."""
    monkeypatch.setattr(ImageClassification, "forward", lambda self, batch: self.run_model(batch) * float("nan"))
    assert fit.main([*arguments(images, epochs=2), "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "the training loss became nan in epoch 1, step 1; lower the learning rate (--model.optimisation.lr)" in said
    assert "kept" not in said
    (made,) = tmp_path.iterdir()
    assert (made / "config.yaml").is_file()
    assert not list(made.rglob("*.ckpt"))


def test_weights_that_are_not_finite_are_not_saved(tmp_path, images, monkeypatch, capsys):
    end = EpochHistory.on_train_epoch_end

    def break_weights(self, trainer, pl_module):
        end(self, trainer, pl_module)
        if trainer.current_epoch == 1:
            with torch.no_grad():
                next(pl_module.adapter.parameters()).fill_(float("inf"))

    with monkeypatch.context() as patch:
        patch.setattr(EpochHistory, "on_train_epoch_end", break_weights)
        assert fit.main([*arguments(images, epochs=3), "--output", str(tmp_path)]) == 2
    assert "is not finite after epoch 2; lower the learning rate" in capsys.readouterr().err
    (made,) = tmp_path.iterdir()
    assert torch.load(made / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 0


def test_full_disk_keeps_the_old_checkpoint(tmp_path, images, monkeypatch, capsys):
    replace = os.replace
    calls = []

    def full(source, target):
        if str(target).endswith("last.ckpt"):
            calls.append(target)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert fit.main([*arguments(images, epochs=3), "--output", str(tmp_path)]) == 2
    assert "no space is left" in capsys.readouterr().err
    (made,) = tmp_path.iterdir()
    assert torch.load(made / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 0
    assert not list((made / "checkpoints").glob(".*"))


def start_and_stop(tmp_path, images, signal_number, epochs):
    """Start a run in a process, send it a signal after three epochs, and return its directory, exit code and output."""
    printed = tmp_path / "printed.txt"
    given = [*arguments(images, *DROPOUT, epochs=epochs), "--output", "parts"]
    with chdir(tmp_path):
        process = start(fit.main, given, output=printed)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        tables = list((tmp_path / "parts").glob("*/metrics.csv"))
        if tables and len(tables[0].read_text().splitlines()) > 3:
            break
        time.sleep(0.01)
    os.kill(process, signal_number)
    code, output = wait(process, 60), printed.read_text()
    (part,) = (tmp_path / "parts").iterdir()
    assert not (part / "results.json").exists(), output
    return part, code, output


@pytest.mark.slow
def test_killed_run_resumes(tmp_path, images):
    part, code, _ = start_and_stop(tmp_path, images, signal.SIGKILL, epochs=20)
    assert code == -signal.SIGKILL
    assert (part / "checkpoints" / "last.ckpt").is_file()
    assert fit.main(["--resume", str(part)]) == 0
    whole = run(tmp_path / "whole", images, *DROPOUT, epochs=20)
    assert without_seconds(read_history(part / "metrics.csv")) == without_seconds(read_history(whole / "metrics.csv"))
    assert results(part)["test"] == results(whole)["test"]


@pytest.mark.slow
def test_ctrl_c_stops_cleanly(tmp_path, images):
    part, code, output = start_and_stop(tmp_path, images, signal.SIGINT, epochs=200)
    assert code == 130
    assert "Traceback" not in output
    assert f"--resume {part.relative_to(tmp_path)}" in output
    assert (part / "checkpoints" / "last.ckpt").is_file()
