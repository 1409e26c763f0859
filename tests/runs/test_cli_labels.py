"""Runs on several labels, on numbers, and on skewed classes: trained, resumed, tested again and used to predict."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
import yaml
from small_label_runs import CHANNELS, SPLITS, arguments, draw, run, write_lists
from small_runs import COLOURS, draw_images, results
from small_runs import run as run_folders

import visionpeft as vp
from visionpeft import evaluate, fit, predict
from visionpeft.runs.history import EpochHistory, read_history
from visionpeft.sharing.model_card import model_card
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.sharing.trained_model import open_run, open_saved


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("own")


@pytest.fixture(scope="module")
def rows(folder):
    return draw(folder)


@pytest.fixture(scope="module")
def several(folder, rows, tmp_path_factory):
    options = write_lists(folder, rows, "several")
    return run(tmp_path_factory.mktemp("runs"), options, epochs=8, figures=True)


@pytest.fixture(scope="module")
def number(folder, rows, tmp_path_factory):
    options = write_lists(folder, rows, "number", "json")
    return run(tmp_path_factory.mktemp("runs"), options, epochs=8, figures=True)


def predicted(made, folder, rows, tmp_path, *more):
    """Entries that the command writes for the test images, in their order."""
    output = tmp_path / "predictions.json"
    files = [str(folder / path) for path, *_ in rows["test"]]
    assert predict.main([str(made), *files, "--output", str(output), *more]) == 0
    return json.loads(output.read_text())


def average_precision(scores, true):
    """Mean over the images that have the label of the precision down to each, best first; no scores are equal."""
    assert len(set(scores)) == len(scores)
    ordered = true[np.argsort(-scores)]
    return (np.cumsum(ordered) / np.arange(1, len(ordered) + 1))[ordered > 0].mean()


def f1(found, true):
    return 2 * (found * true).sum() / (found.sum() + true.sum())


class TestSeveral:
    def test_learns(self, several):
        found = results(several)
        assert found["test"]["map"] > 0.9
        assert found["test"]["f1"] > 0.7
        assert found["objective"] == {"labels": "several", "loss": "bce"}
        assert found["data"]["labels"] == "several"
        history = read_history(several / "metrics.csv")
        assert history[-1]["train/loss"] < history[0]["train/loss"]
        assert {"train/micro_f1", "val/micro_f1", "val/macro_map"} <= history[-1].keys()
        assert {"curves.png", "reliability.png"} <= {path.name for path in several.iterdir()}

    def test_numbers_equal_their_definitions(self, several, folder, rows, tmp_path):
        entries = predicted(several, folder, rows, tmp_path)
        scores = np.array([[entry["probabilities"][name] for name in sorted(CHANNELS)] for entry in entries])
        true = np.array([[name in names for name in sorted(CHANNELS)] for _, names, _ in rows["test"]], float)
        test = results(several)["test"]
        precisions = [average_precision(scores[:, k], true[:, k]) for k in range(3)]
        assert test["map"] == pytest.approx(np.mean(precisions), abs=1e-6)
        by_label = results(several)["labels_tested"]["by_label"]
        assert [by_label[name]["average_precision"] for name in sorted(CHANNELS)] == pytest.approx(precisions, abs=1e-6)
        found = (scores > 0.5).astype(float)
        assert test["f1"] == pytest.approx(np.mean([f1(found[:, k], true[:, k]) for k in range(3)]), abs=1e-6)
        assert test["micro_f1"] == pytest.approx(f1(found, true), abs=1e-6)
        loss = -(true * np.log(scores) + (1 - true) * np.log(1 - scores)).mean()
        assert test["loss"] == pytest.approx(loss, abs=1e-4)
        bins = np.minimum((scores * 15).astype(int), 14)
        error = sum((bins == b).mean() * abs(true[bins == b].mean() - scores[bins == b].mean()) for b in set(bins.flat))
        assert test["ece"] == pytest.approx(error, abs=1e-5)
        assert [entry["labels"] for entry in entries] == [
            [name for name, one in zip(sorted(CHANNELS), row, strict=True) if one] for row in found
        ]

    def test_evaluate_repeats_the_test(self, several, capsys):
        assert evaluate.main([str(several)]) == 0
        again = json.loads((several / "evaluation.json").read_text())
        for key in ("test", "labels_tested", "calibration"):
            assert again[key] == results(several)[key]
        shown = capsys.readouterr().out
        assert "test mAP over 3 of 3 labels" in shown
        assert "expected calibration error" in shown

    def test_csv_of_predictions(self, several, folder, rows, tmp_path):
        output = tmp_path / "out.csv"
        command = [str(several), str(folder / "images"), "--threshold", "0", "--output", str(output)]
        assert predict.main(command) == 0
        assert predict.main(command) == 0  # predictions may be written over
        with output.open(newline="") as file:
            entries = list(csv.DictReader(file))
        assert len(entries) == sum(SPLITS.values())
        assert list(entries[0]) == ["path", "labels", *(f"probability of {name}" for name in sorted(CHANNELS))]
        assert {entry["labels"] for entry in entries} == {"blue;green;red"}
        own = tmp_path / "own.csv"
        own.write_text("path,label\na.png,cat\n")
        assert predict.main([*command[:-1], str(own)]) == 2
        assert own.read_text() == "path,label\na.png,cat\n"

    def test_in_python(self, several, folder, rows, tmp_path):
        trained = open_run(RunDirectory.existing(several))
        assert trained.labels == "several"
        probabilities = trained.answers(torch.tensor([[0.0, 2.0, -100.0]]))
        assert probabilities[0].tolist() == pytest.approx([0.5, 1 / (1 + np.exp(-2)), 0.0], abs=1e-6)

    def test_a_label_that_does_not_occur_in_the_test(self, folder, rows, several, tmp_path):
        """Counts 0 in the mean that torchmetrics takes, and not in the other one."""
        some = [row for row in rows["test"] if "blue" not in row[1]]
        write_lists(tmp_path, {"test": some}, "several")
        changed = ["--data.test", str(tmp_path / "test-several.csv"), "--data.root", str(folder)]
        assert evaluate.main([str(several), *changed]) == 0
        found = json.loads((several / "evaluation.json").read_text())
        assert (found["labels_tested"]["occurring"], found["labels_tested"]["of"]) == (2, 3)
        assert found["labels_tested"]["by_label"]["blue"] == {"images": 0, "average_precision": None, "f1": None}
        assert found["test"]["macro_map"] == pytest.approx(found["test"]["map"] * 2 / 3)

    @pytest.mark.parametrize(
        ("options", "key"),
        [
            (["--model.loss", "asymmetric", "--model.asymmetry.gamma_negative", "2"], "asymmetry"),
            (["--model.positive_weights", "balanced"], "positive_weights"),
        ],
    )
    def test_other_losses(self, options, key, folder, rows, tmp_path):
        made = run(tmp_path, write_lists(folder, rows, "several"), *options, epochs=1)
        objective = results(made)["objective"]
        if key == "asymmetry":
            assert objective["asymmetry"] == {"gamma_positive": 0.0, "gamma_negative": 2.0, "margin": 0.05}
        else:
            counts = [sum(name in names for _, names, _ in rows["train"]) for name in sorted(CHANNELS)]
            assert objective["positive_weights"] == pytest.approx([(24 - count) / count for count in counts])
        assert evaluate.main([str(made)]) == 0
        again = json.loads((made / "evaluation.json").read_text())
        assert (again["objective"], again["test"]) == (objective, results(made)["test"])

    def test_model_card(self, several):
        card = str(model_card(vp.read_metadata(several / "adapter"), results(several), "me/labels"))
        assert "mean average precision of the test split" in card
        assert "trained.answers(logits)  # the probability of each label" in card


class TestNumber:
    def test_learns(self, number, rows):
        found = results(number)
        assert found["test"]["mae"] < 5  # a constant is about that far off
        labels = np.array([value for *_, value in rows["train"]])
        assert found["objective"] == {
            "labels": "number",
            "loss": "mse",
            "mean": pytest.approx(labels.mean()),
            "deviation": pytest.approx(labels.std()),
        }
        assert {"train/mae", "val/mae"} <= read_history(number / "metrics.csv")[-1].keys()
        assert {"curves.png", "predicted_numbers.png"} <= {path.name for path in number.iterdir()}
        assert "ece" not in found["test"]

    def test_numbers_equal_their_definitions(self, number, folder, rows, tmp_path):
        entries = predicted(number, folder, rows, tmp_path)
        found = np.array([entry["predicted_number"] for entry in entries])
        true = np.array([value for *_, value in rows["test"]])
        test = results(number)["test"]
        assert test["mae"] == pytest.approx(abs(found - true).mean(), abs=2e-3)
        assert test["r2"] == pytest.approx(
            1 - ((true - found) ** 2).sum() / ((true - true.mean()) ** 2).sum(), abs=1e-3
        )
        deviation = results(number)["objective"]["deviation"]
        assert test["loss"] == pytest.approx((((true - found) / deviation) ** 2).mean(), abs=1e-3)
        assert 1985 < found.mean() < 2015  # in years, not in standard deviations

    def test_evaluate_repeats_the_test(self, number, capsys):
        assert evaluate.main([str(number)]) == 0
        assert json.loads((number / "evaluation.json").read_text())["test"] == results(number)["test"]
        assert "test R2" in capsys.readouterr().out

    def test_evaluate_keeps_the_scale_of_the_training(self, number, folder, rows, tmp_path):
        """Other training labels must not move what was learnt."""
        moved = {"train": [(path, names, value + 1000) for path, names, value in rows["train"]]}
        write_lists(tmp_path, moved, "number", "json")
        changed = ["--data.train", str(tmp_path / "train-number.json"), "--data.root", str(folder)]
        assert evaluate.main([str(number), *changed]) == 0
        again = json.loads((number / "evaluation.json").read_text())
        assert again["test"] == results(number)["test"]
        assert again["objective"] == results(number)["objective"]

    def test_csv_of_predictions(self, number, folder, tmp_path):
        output = tmp_path / "out.csv"
        for _ in range(2):
            assert predict.main([str(number), str(folder / "images"), "--output", str(output)]) == 0
        with output.open(newline="") as file:
            entries = list(csv.DictReader(file))
        assert list(entries[0]) == ["path", "predicted_number"]
        assert len(entries) == sum(SPLITS.values())

    def test_in_python(self, number):
        trained = open_run(RunDirectory.existing(number))
        objective = results(number)["objective"]
        answers = trained.answers(torch.tensor([[0.0], [1.0]])).tolist()
        assert answers == pytest.approx([objective["mean"], objective["mean"] + objective["deviation"]])

    def test_model_card(self, number):
        card = str(model_card(vp.read_metadata(number / "adapter"), results(number), "me/years"))
        assert "mean absolute error of the test split" in card


class TestResuming:
    """An interrupted run gives what the uninterrupted one gives."""

    @pytest.mark.parametrize(
        ("labels", "more"),
        [
            ("several", ["--model.loss", "asymmetric", "--model.positive_weights", "balanced"]),
            ("number", ["--model.loss", "l1", "--report", "last"]),
        ],
    )
    def test_lists(self, labels, more, folder, rows, tmp_path, monkeypatch):
        options = write_lists(folder, rows, labels)
        whole = run(tmp_path / "whole", options, *more, epochs=4)
        command = [*arguments(options, *more, epochs=4), "--output", str(tmp_path / "parts")]
        self.check(whole, tmp_path / "parts", lambda: fit.main(command), monkeypatch)

    def test_balanced_classes(self, tmp_path, monkeypatch):
        images = draw_images(tmp_path / "squares")
        for number in range(1, 9):
            (images / "red" / f"{number}.png").unlink()
        more = ["--data.balanced", "true", "--model.class_weights", "[1.0, 2.0, 0.5]", "--model.mixup", "0.3"]
        whole = run_folders(tmp_path / "whole", images, *more, epochs=4)
        assert results(whole)["data"]["balanced"] is True
        assert results(whole)["objective"]["class_weights"] == [1.0, 2.0, 0.5]
        config = tmp_path / "parts"

        def interrupted():
            run_folders(config, images, *more, epochs=4)

        self.check(whole, config, interrupted, monkeypatch)
        # Sampling is what is resumed: without it the numbers are others.
        plain = run_folders(tmp_path / "plain", images, *more[2:], epochs=4)
        assert read_history(plain / "metrics.csv")[-1]["train/loss"] != pytest.approx(
            read_history(whole / "metrics.csv")[-1]["train/loss"], rel=1e-4
        )

    @staticmethod
    def check(whole, folder, begin, monkeypatch):
        original = EpochHistory.on_train_epoch_end

        def fail_in_third_epoch(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise ZeroDivisionError
            return original(self, trainer, pl_module)

        with monkeypatch.context() as patch:
            patch.setattr(EpochHistory, "on_train_epoch_end", fail_in_third_epoch)
            with pytest.raises(ZeroDivisionError):
                begin()
        (part,) = folder.iterdir()
        assert not (part / "results.json").exists()
        assert fit.main(["--resume", str(part)]) == 0
        histories = [read_history(each / "metrics.csv") for each in (part, whole)]
        for history in histories:
            for row in history:
                del row["seconds"]
        assert histories[0] == histories[1]
        for key in ("test", "objective"):
            assert results(part)[key] == results(whole)[key]


class TestClasses:
    def test_calibration_is_in_every_result(self, tmp_path):
        """Against the probabilities that the command predicts."""
        images = draw_images(tmp_path / "squares")
        made = run_folders(tmp_path / "runs", images, "--model.class_weights", "balanced", epochs=2, figures=True)
        found = results(made)
        assert (made / "reliability.png").is_file()
        assert found["objective"]["class_weights"] == [1.0, 1.0, 1.0]
        assert evaluate.main([str(made)]) == 0
        again = json.loads((made / "evaluation.json").read_text())
        for key in ("test", "calibration", "objective"):
            assert again[key] == found[key]
        assert sum(found["calibration"]["counts"]) == 6
        output = tmp_path / "out.json"
        assert predict.main([str(made), str(images), "--output", str(output)]) == 0
        # Which images are tested, the configuration of the run says.
        data = vp.data.ImageFolder(**yaml.safe_load((made / "config.yaml").read_text())["data"]["init_args"])
        tested = set(map(str, data.sources["test"].paths))
        entries = [entry for entry in json.loads(output.read_text()) if entry["path"] in tested]
        hits = np.array([f"/{entry['classes'][0]}/" in entry["path"] for entry in entries], float)
        confidences = np.array([entry["probabilities"][0] for entry in entries])
        bins = (confidences * 15).astype(int)
        error = sum((bins == b).mean() * abs(hits[bins == b].mean() - confidences[bins == b].mean()) for b in set(bins))
        assert found["test"]["ece"] == pytest.approx(error, abs=1e-5)
        assert found["test"]["confidence"] == pytest.approx(confidences.mean(), abs=1e-5)
        assert len(hits) == 6
        assert set(COLOURS) == {path.name for path in images.iterdir()}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--data.labels", "classes"], "--data.labels several"),
        (["--data.labels", "many"], "takes one of classes, several, number"),
        (["--model.loss", "mse"], "loss mse is not one of labels 'several'"),
        (["--model.class_weights", "balanced"], "class_weights belongs to labels 'classes'"),
        (["--model.positive_weights", "[1, 2]"], "a list of 3 positive numbers"),
        (["--data.balanced", "true"], "weigh them by --model.positive_weights balanced"),
        (["--model.mixup", "0.2"], "mixup and cutmix mix classes"),
        (["--model.loss", "asymmetric", "--model.asymmetry.gamma_negative", "0.5"], "must be 0 or at least 1"),
    ],
)
def test_refused_before_there_is_a_run(more, said, folder, rows, tmp_path, capsys):
    options = write_lists(folder, rows, "several")
    assert fit.main([*arguments(options, *more), "--output", str(tmp_path / "runs")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_half_precision_would_round_numbers(folder, rows, tmp_path, capsys):
    """Lightning converts labels with the images; zeros and ones are exact in any precision."""
    options = [*write_lists(folder, rows, "number"), "--trainer.precision", "bf16-true"]
    assert fit.main([*arguments(options), "--output", str(tmp_path / "runs")]) == 2
    assert "rounds the numbers to learn to two or three digits; use bf16-mixed" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    mixed = run(tmp_path, write_lists(folder, rows, "number"), "--trainer.precision", "bf16-mixed", epochs=1)
    assert results(mixed)["precision"] == "bf16-mixed"
    assert results(mixed)["test"]["mae"] < 20
    half = run(tmp_path, write_lists(folder, rows, "several"), "--trainer.precision", "bf16-true", epochs=1)
    assert 0 < results(half)["test"]["map"] <= 1


@pytest.mark.parametrize("labels", ["several", "number"])
@pytest.mark.parametrize(
    "more",
    [
        ["--model.method", "SPT"],
        ["--model.cache", "memory", "--data.augmentation", "none", "--model.method.blocks", "last:1"],
    ],
    ids=["SPT", "cache"],
)
def test_with_what_looks_at_the_data_first(labels, more, folder, rows, tmp_path):
    """Methods that choose what they train by the gradient of the loss, and a kept trunk."""
    made = run(tmp_path, write_lists(folder, rows, labels), *more, epochs=2)
    assert results(made)["objective"]["labels"] == labels
    assert evaluate.main([str(made)]) == 0
    assert json.loads((made / "evaluation.json").read_text())["test"] == pytest.approx(results(made)["test"])


@pytest.mark.parametrize("labels", ["several", "number"])
def test_learners_take_classes_only(labels, folder, rows, tmp_path, capsys):
    options = write_lists(folder, rows, labels)
    command = ["--config", "fewshot_coop.yaml", *options, "--output", str(tmp_path / "runs")]
    assert fit.main(command) == 2
    error = capsys.readouterr().err
    assert "a learner on a CLIP tells which one of the class names fits an image" in error
    assert not (tmp_path / "runs").exists()


def test_options_of_other_labels_are_refused(several, number, folder, capsys):
    for made, more in ((several, ["--top-k", "2"]), (number, ["--threshold", "0.3"]), (number, ["--top-k", "2"])):
        assert predict.main([str(made), str(folder / "images"), *more]) == 2
        assert "leave it out" in capsys.readouterr().err
    assert predict.main([str(several), str(folder / "images"), "--threshold", "2"]) == 2
    assert "a probability from 0 to 1" in capsys.readouterr().err


def test_an_adapter_of_other_labels_is_refused(several, folder, rows, capsys):
    options = write_lists(folder, rows, "number")
    assert evaluate.main([str(several), *options[2:]]) == 2
    assert "has learnt from labels 'several', not 'number'" in capsys.readouterr().err


def test_metadata_of_others(tmp_path):
    """What was saved without a task may call anything its objective; a number needs its scale."""

    def model():
        torch.manual_seed(0)
        return timm.create_model("test_vit", num_classes=1)

    trained = model()
    vp.attach(trained, vp.LoRA(rank=2))
    for objective in ("accuracy", {"loss": "bce"}, None):
        vp.save(trained, tmp_path, metadata={"objective": objective})
        assert open_saved(tmp_path, model=model(), own=True).labels == "classes"
        model_card(vp.read_metadata(tmp_path), None, "me/own")
    vp.save(trained, tmp_path, metadata={"objective": {"labels": "number", "mean": 1.0}})
    with pytest.raises(vp.StorageError, match="does not say their deviation"):
        open_saved(tmp_path, model=model(), own=True)
