"""Learners on the command line: what a run leaves behind, evaluating, predicting with other class names, resuming."""

import csv
import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_learner_runs import CLIP, learner_arguments, run_learner
from small_runs import COLOURS, copied_in, draw_images, results, run

from visionpeft import evaluate, fit, predict
from visionpeft.clip.description import read_learner
from visionpeft.clip.learners import TipAdapter
from visionpeft.clip.storage import load_learner
from visionpeft.models.open_clip import create_open_clip
from visionpeft.runs.history import read_history

TRAINED = {
    "CoOp": [],
    "CoCoOp": [],
    "ProGrad": [],
    "KgCoOp": [],
    "MaPLe": [],
    "IVLP": [],
    "PromptSRC": ["--model.learner.average_mean", "2", "--model.learner.average_std", "1"],
    "CLIPAdapter": [],
    "TipAdapter": ["--model.learner.train_keys", "true"],
    "CLIPLoRA": [],
}
# contexts, averages of epochs, what is chosen after the last one, and an adapter; the others end as CoOp does
FINISHED_IN_WAYS_OF_THEIR_OWN = ("CoOp", "PromptSRC", "TipAdapter", "CLIPLoRA")
FITTED = {
    "ZeroShot": [],
    "TPT": ["--model.learner.num_views", "4", "--model.learner.selection", "0.5"],
    "TipAdapter": [],
    "CLIPLinearProbe": [],
    "TDA": ["--data.test_order", "shuffled"],
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, images):
    return run_learner(tmp_path_factory.mktemp("runs"), images, figures=True)


def without_seconds(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def predictions(run: Path, images: Path, folder: Path, *more: str) -> list[dict]:
    output = folder / "predictions.json"
    assert predict.main([str(run), str(images), "--output", str(output), *more]) == 0
    return json.loads(output.read_text())


def test_run_directory_is_complete(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        *("config.yaml", "data.json", "environment.json", "metrics.csv", "tensorboard", "checkpoints", "learner"),
        *(
            "results.json",
            ".lock",
            "draw.json",
            "curves.png",
            "confusion_matrix.png",
            "reliability.png",
            "wrong_predictions.png",
        ),
    }
    drawn = json.loads((finished / "draw.json").read_text())
    assert (drawn["shots"], drawn["seed"], len(drawn["train"])) == (4, 1, 12)
    assert not any(Path(path).is_absolute() for path in drawn["train"])
    checkpoint = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {"learner.vectors"}
    assert (finished / "learner" / "learner.safetensors").stat().st_size < 8_000


def test_results_say_what_was_measured(finished):
    found = results(finished)
    assert found["learner"]["class"] == "CoOp"
    assert found["learner"]["options"]["position"] == "end"
    assert found["backbone"]["name"] == "open_clip/tiny_clip"
    assert found["template"] is None
    assert found["parameters"]["trainable"] == 16 * 32
    assert (found["data"]["shots"], found["data"]["draw_seed"], found["seed"]) == (4, 1, 1)
    assert found["data"]["class_subset"] == "all"
    assert found["data"]["sizes"]["train"] == 12
    assert found["reported"] == "last of 3 epochs"


def test_learning_rates_are_those_of_the_epochs(finished):
    rates = [row["lr"] for row in read_history(finished / "metrics.csv")]
    assert rates == pytest.approx([0.05, 0.0375, 0.0125], rel=1e-6)  # behind an epoch that of the next one


def test_learner_folder_loads_without_the_task(finished, images):
    torch.manual_seed(1)  # random weights in the place of published ones
    clip = create_open_clip("open_clip/tiny_clip", False, None)
    learner = load_learner(finished / "learner", clip, open_clip.get_tokenizer("tiny_clip"))
    assert learner.class_names == list(COLOURS)
    assert learner.vectors.shape == (16, 32)


def test_evaluate_repeats_the_test(finished):
    assert evaluate.main([str(finished)]) == 0
    again = json.loads((finished / "evaluation.json").read_text())
    assert again["test"] == results(finished)["test"]
    assert again["learner"] == results(finished)["learner"]


def test_predict_with_the_trained_names(finished, images, tmp_path):
    rows = predictions(finished, images, tmp_path)
    assert len(rows) == 30
    assert all(sorted(row["classes"]) == list(COLOURS) for row in rows)
    assert all(sum(row["probabilities"]) == pytest.approx(1, abs=1e-4) for row in rows)


def test_predict_with_other_names(finished, images, tmp_path):
    given = "red kite, buzzard,black-headed gull ,heron"
    rows = predictions(finished, images / "red" / "0.png", tmp_path, "--class-names", given)
    names = ["red kite", "buzzard", "black-headed gull", "heron"]
    assert sorted(rows[0]["classes"]) == sorted(names)
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n\n")
    listed = predictions(
        finished, images / "red" / "0.png", tmp_path, "--class-names", str(tmp_path / "names.txt"), "--top-k", "2"
    )
    assert listed[0]["classes"] == rows[0]["classes"][:2]
    assert listed[0]["probabilities"] == rows[0]["probabilities"][:2]


def test_names_decide_and_not_their_order(finished, images, tmp_path):
    image = images / "green" / "1.png"
    first, second = (predictions(finished, image, tmp_path, "--class-names", names)[0] for names in ("a,b c", "b c,a"))
    assert first == second


def test_predict_reads_gray_and_transparent_images(finished, tmp_path):
    Image.new("L", (40, 30), 100).save(tmp_path / "gray.png")
    Image.new("RGBA", (40, 30), (200, 10, 10, 100)).save(tmp_path / "transparent.png")
    assert len(predictions(finished, tmp_path, tmp_path)) == 2


@pytest.mark.parametrize("learner", TRAINED)
def test_resumed_run_equals_uninterrupted(learner, tmp_path, images):
    part = tmp_path / "part"
    with copied_in(1, part):
        whole = run_learner(tmp_path / "whole", images, *TRAINED[learner], learner=learner)
    assert not (part / "results.json").exists()
    assert not (part / "learner").exists()
    assert fit.main(["--resume", str(part)]) == 0
    assert without_seconds(read_history(part / "metrics.csv")) == without_seconds(read_history(whole / "metrics.csv"))
    assert results(part)["test"] == results(whole)["test"]
    saved = [(folder / "learner" / "learner.safetensors").read_bytes() for folder in (part, whole)]
    assert saved[0] == saved[1]
    if learner not in FINISHED_IN_WAYS_OF_THEIR_OWN:
        return
    # Once more: nothing is left to train, and what follows the training gives the same again.
    assert fit.main(["--resume", str(part)]) == 0
    assert (part / "learner" / "learner.safetensors").read_bytes() == saved[0]
    assert results(part).get("chosen") == results(whole).get("chosen")
    assert evaluate.main([str(part)]) == 0
    assert json.loads((part / "evaluation.json").read_text())["test"] == results(part)["test"]


@pytest.mark.parametrize("learner", FITTED)
def test_learner_without_gradient_steps(learner, tmp_path, images):
    made = run_learner(tmp_path, images, *FITTED[learner], learner=learner, figures=True)
    found = results(made)
    assert found["reported"] == "without gradient steps"
    assert not (made / "checkpoints").exists()
    assert not (made / "curves.png").exists()
    assert (made / "confusion_matrix.png").exists()
    assert ("chosen" in found) == (learner in ("TipAdapter", "CLIPLinearProbe"))
    assert ("without_adaptation" in found) == (learner in ("TPT", "TDA"))
    assert ("stream" in found) == (learner == "TDA")
    assert fit.main(["--resume", str(made)]) == 0
    assert results(made)["test"] == found["test"]
    assert evaluate.main([str(made)]) == 0
    assert json.loads((made / "evaluation.json").read_text())["test"] == found["test"]
    assert len(predictions(made, images, tmp_path)) == 30


@pytest.mark.parametrize("learner", ["TDA", "TPT"])
def test_what_adapts_while_testing_is_recorded_beside_zero_shot(learner, tmp_path, images):
    """Under the same template, which TPT has as its first words."""
    options = {"TDA": [], "TPT": ["--model.learner.num_views", "4"]}[learner]
    adapted = results(run_learner(tmp_path, images, *options, learner=learner))
    plain = results(run_learner(tmp_path, images, "--model.learner.template", "a photo of a {}.", learner="ZeroShot"))
    assert adapted["without_adaptation"]["top1"] == pytest.approx(plain["test"]["top1"], abs=1e-6)
    assert adapted["without_adaptation"]["ece"] == pytest.approx(plain["test"]["ece"], abs=1e-5)
    assert adapted["test"]["ece"] != pytest.approx(plain["test"]["ece"], abs=1e-5)


def test_template_is_recorded(tmp_path, images):
    own = run_learner(tmp_path, images, "--data.template", "a square in {}.", learner="ZeroShot")
    assert results(own)["template"] == ["a square in {}."]
    assert read_learner(own / "learner")["templates"] == ["a square in {}."]
    given = run_learner(tmp_path, images, "--model.learner.template", "{}!", learner="ZeroShot")
    assert results(given)["template"] == ["{}!"]


def test_nothing_to_train_needs_no_training_images(tmp_path, images):
    made = run_learner(tmp_path, images, "--data.shots", "0", learner="ZeroShot")
    assert set(results(made)["data"]["sizes"]) == {"test"}


def test_views_of_test_images(tmp_path, images):
    made = run_learner(
        tmp_path, images, "--data.test_views", "4", "--data.shots", "0", *FITTED["TPT"][2:], learner="TPT"
    )
    assert results(made)["data"]["test_views"] == 4
    assert evaluate.main([str(made)]) == 0
    assert json.loads((made / "evaluation.json").read_text())["test"] == results(made)["test"]


def test_tuning_from_a_trained_context(finished, tmp_path, images):
    context = tmp_path / "context"
    shutil.copytree(finished / "learner", context)
    made = run_learner(
        tmp_path / "runs", images, "--model.learner.context", str(context), *FITTED["TPT"], learner="TPT"
    )
    assert results(made)["learner"]["options"]["context_length"] == 16
    shutil.rmtree(context)  # the run holds the context that it started from
    assert evaluate.main([str(made)]) == 0
    assert json.loads((made / "evaluation.json").read_text())["test"] == results(made)["test"]
    assert len(predictions(made, images / "red", tmp_path, "--class-names", "a,b")) == 10


def test_best_epoch_can_be_reported(tmp_path, images):
    made = run_learner(tmp_path, images, "--report", "best")
    assert "best on the validation split" in results(made)["reported"]


def test_what_is_chosen_is_chosen_for_the_epoch_that_is_reported(tmp_path, images, monkeypatch):
    """alpha and beta of Tip-Adapter-F belong to the keys that are tested and saved, not to those of the last epoch."""
    seen, choose = [], TipAdapter.choose

    def watched(learner):
        chosen = choose(learner)
        seen.append((learner.keys.detach().clone(), chosen))
        return chosen

    monkeypatch.setattr(TipAdapter, "choose", watched)
    options = ["--report", "best", "--model.learner.train_keys", "true", "--model.learner.max_alpha", "20"]
    made = run_learner(tmp_path, images, *options, learner="TipAdapter", epochs=4)
    saved = load_file(next((made / "learner").glob("*.safetensors")))
    (last_keys, _), (keys, chosen) = seen
    assert torch.equal(saved["keys"], keys)
    assert not torch.equal(keys, last_keys)  # another epoch than the last was the best
    assert torch.isclose(saved["alpha"], torch.tensor(chosen["alpha"]))
    assert torch.isclose(saved["beta"], torch.tensor(chosen["beta"]))
    assert (chosen["alpha"], chosen["beta"]) != (1.0, 1.0)
    assert chosen.items() <= results(made)["chosen"].items()


def test_evaluate_on_other_classes(finished, tmp_path):
    others = draw_images(tmp_path / "others", per_class=6)
    (others / "blue").rename(others / "a tiger")
    assert evaluate.main([str(finished), "--data.root", str(others), "--data.shots", "0"]) == 0
    found = json.loads((finished / "evaluation.json").read_text())
    assert found["data"]["classes"] == 3
    assert found["test"] != results(finished)["test"]


WRONG = {
    "learner": (["--model.learner", "Coop"], "there is no class 'Coop'; did you mean CoOp"),
    "method as a learner": (
        ["--model.learner", "LoRA"],
        "there is no class 'LoRA' that goes here; tasks go to --model",
    ),
    "help of a method": (["--model.help", "LoRA"], "there is no class 'LoRA' that goes here; tasks go to --model"),
    "option": (
        ["--model.learner.context_lenght", "4"],
        "CoOp has no option 'context_lenght'; did you mean context_length",
    ),
    "value": (["--model.learner.context_length", "x"], "context_length takes a whole number or null, not 'x'"),
    "choice": (["--model.learner.position", "top"], "position takes one of end, middle, front, not 'top'"),
    "refused by the learner": (["--model.learner.context_length", "0"], "must be an integer of at least 1, not 0"),
    "too long": (["--model.learner.context_length", "90"], "this CLIP reads 77"),
    "schedule": (
        ["--model.optimisation.schedule", "step"],
        "takes one of cosine, epoch_cosine, cosine_by_epoch, not 'step'",
    ),
    "backbone": (["--model.backbone", "vit_base_patch16_224"], "there is no CLIP model 'vit_base_patch16_224'"),
    "OpenCLIP model": (["--model.backbone", "open_clip/tiny_clp"], "OpenCLIP has no model 'tiny_clp'"),
    "weights": (["--model.pretrained", "true"], "name the weights of open_clip/tiny_clip"),
    "chunk": (["--model.chunk_size", "0"], "chunk_size must be at least 1"),
    "compile": (["--model.compile", "true"], "a learner is not compiled"),
    "task field": (["--model.method", "LoRA"], "PromptLearning has no option 'method'"),
    "template": (["--data.template", "photo of {} and {}"], "must hold {} exactly once"),
    "learner template": (["--model.learner", "ZeroShot", "--model.learner.template", "phot"], "no {} for the class"),
    "deep": (["--model.learner", "MaPLe", "--model.learner.depth", "5"], "depth"),
}


@pytest.mark.parametrize(("more", "said"), WRONG.values(), ids=list(WRONG))
def test_wrong_command_line(more, said, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert fit.main(learner_arguments(images, *more)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--seed_everything", "2"], "was trained on other weights"),
        (["--model.backbone", "open_clip/other_tiny_clip"], "the learner in"),
        (["--data.template", "no place"], "no {} for the class name"),
        (["--model.learner.position", "front"], "--model.learner.position front: the learner is that in"),
    ],
)
def test_evaluate_refuses(finished, more, said, capsys):
    (finished / "evaluation.json").unlink(missing_ok=True)
    assert evaluate.main([str(finished), *more]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (finished / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("one", "names 1; give at least two classes"),
        ("a,a", "are both 'a'"),
        ("nowhere.txt", "nowhere.txt does not exist"),
        ("a," + "very " * 90 + "long", "this CLIP reads 77"),
    ],
)
def test_predict_refuses_names(finished, images, names, said, capsys):
    assert predict.main([str(finished), str(images), "--class-names", names]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_missing_image_is_refused_before_a_run_is_begun(tmp_path, capsys):
    for split, number in (("train", 4), ("test", 1)):
        lines = [f"{name}{index}.png,{name}" for name in ("a", "b") for index in range(number)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    arguments = learner_arguments(tmp_path, "--data.dataset", "list")
    assert fit.main([*arguments, "--output", str(tmp_path / "runs")]) == 2
    assert "a0.png" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_training_without_end_is_refused(tmp_path, images, capsys):
    arguments = learner_arguments(images, "--data.augmentation", "none", epochs=-1)
    assert fit.main([*arguments, "--output", str(tmp_path)]) == 2
    assert "--trainer.max_epochs -1 has no end" in capsys.readouterr().err


def test_names_in_a_file_with_a_byte_order_mark(finished, images, tmp_path):
    (tmp_path / "names.txt").write_text("sky\ngrass\n", encoding="utf-8-sig")
    output = tmp_path / "out.json"
    assert (
        predict.main([str(finished), str(images), "--class-names", f"{tmp_path}/names.txt", "--output", str(output)])
        == 0
    )
    assert set(json.loads(output.read_text())[0]["classes"]) == {"sky", "grass"}


@pytest.mark.parametrize("name", ["train.csv", "data.json"])
def test_predict_replaces_predictions_and_nothing_else(name, finished, images, tmp_path, capsys):
    output = tmp_path / name
    output.write_text("path,label\ncat.jpg,cat\n" if name.endswith("csv") else '{"cat.jpg": "cat"}')
    before = output.read_bytes()
    command = [str(finished), str(images / "red"), "--output", str(output)]
    assert predict.main(command) == 2
    assert "something else than predictions" in capsys.readouterr().err
    assert output.read_bytes() == before
    output.unlink()
    assert predict.main(command) == 0
    written = output.read_bytes()
    assert predict.main(command) == 0  # its own predictions are replaced
    assert output.read_bytes() == written


def test_predict_refuses_an_output_folder_that_is_not_there(finished, images, tmp_path, capsys):
    assert predict.main([str(finished), str(images), "--output", f"{tmp_path}/none/out.csv"]) == 2
    assert "none does not exist" in capsys.readouterr().err


def test_what_is_bound_to_its_classes_takes_no_others(tmp_path, images, capsys):
    made = run_learner(tmp_path, images, "--model.learner.class_specific", "true", epochs=1)
    assert predict.main([str(made), str(images), "--class-names", "a,b,c"]) == 2
    assert "takes no other class names" in capsys.readouterr().err
    assert len(predictions(made, images, tmp_path, "--class-names", ",".join(COLOURS))) == 30
    head = run(tmp_path / "heads", images, epochs=1)
    assert predict.main([str(head), str(images), "--class-names", "a,b,c"]) == 2
    assert "holds a head for its own 3 classes" in capsys.readouterr().err


def test_resuming_with_another_learner_is_refused(tmp_path, images, capsys):
    made = run_learner(tmp_path, images, epochs=1)
    assert fit.main(["--resume", str(made), "--model.learner.context_length", "4"]) == 2
    assert "--model.learner.context_length 4 cannot be changed while" in capsys.readouterr().err


def test_predictions_as_a_table(finished, images, tmp_path):
    output = tmp_path / "out.csv"
    assert predict.main([str(finished), str(images), "--class-names", "a,b", "--output", str(output)]) == 0
    with output.open(newline="") as file:
        assert {row["class_1"] for row in csv.DictReader(file)} <= {"a", "b"}


def test_clip_of_the_tests_is_small():
    assert CLIP[1] == "open_clip/tiny_clip"
    clip = create_open_clip(CLIP[1], False, None)
    assert sum(parameter.numel() for parameter in clip.parameters()) < 2_000_000
