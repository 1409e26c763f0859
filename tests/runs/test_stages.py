"""Runs in stages: train, choose, go back to the start, train again, whenever the process is killed."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from forked import start, wait
from safetensors.torch import load_file
from small_runs import arguments, configure, draw_images, results, run

import visionpeft as vp
from visionpeft import fit
from visionpeft.runs import held_out
from visionpeft.runs.held_out import HeldOutSteps
from visionpeft.runs.history import read_history
from visionpeft.tasks import ImageClassification

# `VISIONPEFT_KILLS=20 pytest tests/runs/test_stages.py -k killed_at_random` kills a longer run more often
KILLS = int(os.environ.get("VISIONPEFT_KILLS", "7"))
EPOCHS = {"stages/1": max(2, KILLS // 5), ".": max(3, KILLS // 2)}
ADAPTER = "adapter/adapter.json"
LTSFT = ("--model.method", "LTSFT", "--model.method.density", "0.02", "--stage_epochs", f"[{EPOCHS['stages/1']}]")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, images):
    return run(tmp_path_factory.mktemp("whole"), images, *LTSFT, epochs=EPOCHS["."])


def numbers(folder):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_history(folder)]


def fit_and_be_killed(command, point, note):
    """Run `fit`, and die before the write of a file of this number, or half a number higher, after it."""
    replace, written = os.replace, 0

    def dying(source, target):
        nonlocal written
        written += 1
        if written == point:
            Path(note).write_text(str(target))
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if written == int(point) and written < point:
            Path(note).write_text(str(target))
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = dying
    return fit.main(command)


def test_killed_at_random_writes_it_resumes_in_the_right_stage(tmp_path, images, whole):
    draw, killed = random.Random(30), []
    command = [*arguments(images, *LTSFT, epochs=EPOCHS["."]), "--output", str(tmp_path / "parts")]
    for _ in range(KILLS):
        note = tmp_path / "note"
        point = draw.randrange(2, 9) / 2 + (not killed)  # a new run writes one file more, by which its data are known
        code = wait(start(fit_and_be_killed, command, point, note), 60)
        assert code == -signal.SIGKILL
        (part,) = (tmp_path / "parts").iterdir()
        killed.append(Path(note.read_text()).relative_to(part).as_posix())
        command = ["--resume", str(part)]
    assert fit.main(command) == 0
    # in both trainings, and where one ends and the other begins
    if KILLS == 7:  # otherwise in both trainings is enough
        assert {"stages/1/checkpoints/last.ckpt", "stages/1/choice.safetensors", "checkpoints/last.ckpt"} <= {*killed}
    assert len({file.startswith("stages/1/") for file in killed}) == 2
    for folder, epochs in EPOCHS.items():
        assert numbers(part / folder / "metrics.csv") == numbers(whole / folder / "metrics.csv")
        assert len(numbers(part / folder / "metrics.csv")) == epochs
    ours, theirs = results(part), results(whole)
    assert ours["test"] == theirs["test"]
    assert [each["epochs"] for each in ours["earlier_stages"]] == [EPOCHS["stages/1"]]
    assert ours["parameters"] == theirs["parameters"]
    for file in ("stages/1/choice.safetensors", "adapter/adapter.safetensors"):
        ours, theirs = load_file(part / file), load_file(whole / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_what_does_not_go_with_stages_is_refused_before_there_is_a_run(tmp_path, images, capsys):
    staged = ["--model.method", "LTSFT"]
    refused = {
        "LoRA is trained once": ["--stage_epochs", "[2]"],
        "gives 2 numbers, but LTSFT has 1 training before": [*staged, "--stage_epochs", "[2, 3]"],
        "leaves a training of LTSFT without an epoch": [*staged, "--stage_epochs", "[0]"],
        "--trainer.limit_train_batches 0 leaves nothing to train on": [*staged, "--trainer.limit_train_batches", "0"],
        "compile is made for one": [*staged, "--model.compile", "true"],
        "AutoLoRA: held_out 0.01 of 21 training images leaves one of the two parts empty": [
            *("--model.method", "AutoLoRA", "--model.method.held_out", "0.01")
        ],
        "holds out 6 of 21 training images, and drop_last leaves no batch of 16 of the other 15": [
            *("--model.method", "AutoLoRA", "--data.drop_last", "true", "--data.batch_size", "16")
        ],
        "on one device": [*staged, "--trainer.devices", "2"],
    }
    for sentence, options in refused.items():
        assert fit.main([*arguments(images, *options), "--output", str(tmp_path / "runs")]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    enough = ("--model.method", "AutoLoRA", "--data.drop_last", "true", "--data.batch_size", "15")
    made = run(tmp_path, images, *enough, epochs=1)
    assert read(made / "stages/1/choice.json")["epochs"] == 1


def test_another_method_does_not_resume_a_run_in_stages(whole, tmp_path, capsys):
    whole = shutil.copytree(whole, tmp_path / "run")
    configure(whole, {"class_path": "BitFit"}, stage_epochs=None)
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*") if file.is_file() and file.name != ".lock"}
    assert fit.main(["--resume", str(whole)]) == 2
    assert "is a run in stages, and BitFit is trained once" in capsys.readouterr().err
    configure(whole, {"class_path": "LTSFT", "init_args": {"density": 0.03}})
    before |= {whole / "config.yaml": (whole / "config.yaml").stat().st_mtime_ns}
    assert fit.main(["--resume", str(whole)]) == 2
    assert "with other options than LTSFT has" in capsys.readouterr().err
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_callbacks_begin_anew_in_each_stage(tmp_path, images):
    """One that had stopped the first training would stop the second, too, unless it were another one."""
    stopping = "{class_path: EarlyStopping, init_args: {monitor: train/loss, patience: 1, stopping_threshold: 100}}"
    xprompt = ("--model.method", "XPrompt", "--model.method.samples", "5")
    made = run(tmp_path, images, *xprompt, f"--trainer.callbacks=[{stopping}]", "--report", "last")
    assert len(numbers(made / "stages" / "1" / "metrics.csv")) == len(numbers(made / "metrics.csv")) == 1
    (begun,) = (v for k, v in load_file(made / "stages/1/choice.safetensors").items() if k.endswith("pieces"))
    assert begun.numel() == results(made)["parameters"]["adapter"] == 80 * 4


def test_a_part_of_the_training_images_is_held_out_for_the_ranks(tmp_path, images, monkeypatch):
    """In the first stage alone, never seen by the other optimiser; killed after an epoch, the run goes the same way."""
    seen = {"trained": [], "held out": []}

    def colours(batch):
        return [tuple(image.flatten()[:4].tolist()) for image in batch]

    class Looking(HeldOutSteps):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            seen["trained"] += colours(batch[0])
            seen["held out"] += colours(self.batch(trainer.global_step)[0])
            super().on_train_batch_start(trainer, task, batch, batch_idx)

    monkeypatch.setattr(held_out, "HeldOutSteps", Looking)
    auto = ("--model.method", "AutoLoRA", "--model.method.selection_lr", "0.1", "--model.head_init", "truncated_normal")
    auto += ("--model.optimisation.lr", "0.1", "--data.augmentation", "none")
    made = run(tmp_path / "whole", images, *auto, epochs=2)
    trained, held = ({*seen[name]} for name in ("trained", "held out"))
    assert (len(trained), len(held)) == (15, 6)  # of 21 images, the others are validated and tested on
    assert not trained & held
    description = read(made / "stages/1/choice.json")
    assert description["held_out_samples"] == 6
    (method,) = description["methods"]
    assert {*method["fields"]["ranks"].values()} - {8}  # the selections have moved

    monkeypatch.undo()
    goes_the_same_way(made, tmp_path, arguments(images, *auto, epochs=2))


def test_a_method_chooses_by_data_before_its_first_stage_and_after_it(tmp_path, images):
    dip = ("--model.method", "FishDip", "--model.method.renewals", "1", "--model.method.among", "blocks")
    dip += ("--model.head_init", "truncated_normal", "--stage_epochs", "[2]")
    made = run(tmp_path / "whole", images, *dip, epochs=1)
    first, second = (read(made / file)["methods"][0]["fields"] for file in ("stages/1/choice.json", ADAPTER))
    assert sum(first["entries"].values()) < sum(second["entries"].values())  # those of both stages are saved
    assert first["before"]
    assert not second["before"]
    goes_the_same_way(made, tmp_path, arguments(images, *dip, epochs=1))


def goes_the_same_way(made, folder, command):
    """A run that is killed after an epoch of its first stage, and resumed, gives the adapter of a whole one."""
    command = [*command, "--output", str(folder / "parts")]
    assert wait(start(fit_and_be_killed, command, 5.5, folder / "note"), 60) == -signal.SIGKILL
    (part,) = (folder / "parts").iterdir()
    assert (folder / "note").read_text() == str(part / "stages/1/checkpoints/last.ckpt")
    assert fit.main(["--resume", str(part)]) == 0
    ours, theirs = (load_file(each / "adapter/adapter.safetensors") for each in (part, made))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def read(file):
    return json.loads(file.read_text())


def test_a_task_in_its_first_stage_is_not_saved(tmp_path):
    task = ImageClassification(
        vp.LTSFT(), ["a", "b"], "test_vit", pretrained=False, backbone_kwargs={"img_size": 32, "depth": 2}
    )
    with pytest.raises(vp.ConfigurationError, match="it is trained in stages, 1 more of them to come"):
        vp.save(task.model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
