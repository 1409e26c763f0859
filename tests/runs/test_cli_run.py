"""What a run leaves behind, and evaluating and predicting with it."""

import csv
import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from small_runs import COLOURS, arguments, draw_images, results, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import visionpeft as vp
from visionpeft import evaluate, fit, predict, tasks
from visionpeft.runs.as_trained import OF_TEST, OF_TRAINING, TRAINED
from visionpeft.runs.history import read_history
from visionpeft.runs.signatures import parameters
from visionpeft.tasks import ImageClassification


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, images):
    return run(tmp_path_factory.mktemp("runs"), images, "--model.optimisation.lr", "0.02", epochs=8, figures=True)


def test_run_directory_is_complete(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        *("config.yaml", "environment.json", "metrics.csv", "tensorboard", "checkpoints", "adapter", "results.json"),
        *("curves.png", "confusion_matrix.png", "wrong_predictions.png"),
    }
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}


def test_results_say_what_was_measured(finished):
    found = results(finished)
    assert found["test"]["top1"] > 0.6
    assert found["data"]["sizes"] == {"train": 21, "val": 3, "test": 6}
    assert found["data"]["normalisation"]["source"] == "pretrained"
    assert found["backbone"]["name"] == "test_vit"
    assert found["parameters"]["trainable"] == found["parameters"]["adapter"] + 3 * 64 + 3
    assert found["training_seconds"] > 0
    assert found["peak_memory_bytes"] > 2**20


def test_confusion_counts_agree_with_accuracy(finished):
    found = results(finished)["test"]
    assert found["mean_per_class"] == pytest.approx(found["top1"])  # two test images in every class


def test_metrics_has_one_row_for_each_epoch(finished):
    rows = read_history(finished / "metrics.csv")
    assert [row["epoch"] for row in rows] == list(range(8))
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert rows[-1]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_checkpoint_holds_no_backbone(finished):
    checkpoint = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]
    assert all(key.startswith("model.peft.") for key in checkpoint["state_dict"])
    saved = sum(value.numel() for value in checkpoint["state_dict"].values())
    assert saved == results(finished)["parameters"]["trainable"]


def test_adapter_folder_loads_into_the_plain_backbone(finished):
    metadata = vp.read_metadata(finished / "adapter")
    assert metadata["class_names"] == list(COLOURS)
    assert metadata["preprocessing"]["input_size"] == [32, 32]


def test_evaluate_repeats_the_test(finished, capsys):
    assert evaluate.main([str(finished)]) == 0
    again = json.loads((finished / "evaluation.json").read_text())
    assert again["test"] == results(finished)["test"]
    assert "test top-1 accuracy" in capsys.readouterr().out


def test_evaluate_refuses_classes_of_other_names(finished, images, tmp_path, capsys):
    """By their order alone, squares of other colours would be counted as right or wrong."""
    for name, other in {"blue": "amber", "green": "green", "red": "red"}.items():
        shutil.copytree(images / name, tmp_path / "other" / other)
    assert evaluate.main([str(finished), "--data.root", str(tmp_path / "other")]) == 2
    assert "class 0 is 'blue', not 'amber'" in capsys.readouterr().err
    shutil.copytree(images, tmp_path / "same")
    assert evaluate.main([str(finished), "--data.root", str(tmp_path / "same")]) == 0


def test_evaluate_takes_other_data(finished, images):
    assert evaluate.main([str(finished), "--data.test_fraction", "0.5"]) == 0
    assert json.loads((finished / "evaluation.json").read_text())["data"]["sizes"]["test"] == 15


OTHER_METHOD = """
model: {class_path: ImageClassification, init_args: {method: {class_path: AdaptFormer}, optimisation: {lr: 0.5}}}
"""
OTHER_TRAINING = """
report: best
model: {init_args: {optimisation: {lr: 0.5}, mixup: 0.3}}
data: {init_args: {batch_size: 5}}
"""


def test_evaluate_refuses_what_the_run_does_not_have(finished, tmp_path, capsys):
    """A configuration of another method was read, and the trained method tested, without a word about it."""
    (tmp_path / "method.yaml").write_text(OTHER_METHOD)
    for given, said in (
        (["--config", str(tmp_path / "method.yaml")], "--model.method AdaptFormer: the method is that of the adapter"),
        (["--config", "fewshot_coop.yaml"], "was trained by ImageClassification"),
        (["--model.method.rank", "4"], "as trained (8)"),
        (["--model.method", "[LoRA, VPT]"], "--model.method [LoRA, VPT]"),
        (["--model.method", "[LoRA, VPT]"], "as trained (LoRA)"),
        (["--model.method", "[{class_path: LoRA, init_args: {rank: 4}}]"], "--model.method.rank 4"),
        (["--model.train", "[cls_token]"], "the train is that of the adapter"),
        (["--model.optimisation.lr", "0.1"], "changes nothing about a test"),
        (["--model.loss", "bce"], "the loss is that of the adapter"),
        (["--model.loss", "bce"], "as trained (cross_entropy)"),
        (["--report=best"], "--report is an option of a training"),
    ):
        assert evaluate.main([str(finished), *given]) == 2
        assert said in capsys.readouterr().err


def test_evaluate_takes_what_says_the_same_and_what_is_about_the_test(finished, tmp_path):
    """A configuration may say how to train, too, as those of benchmarks do."""
    assert evaluate.main([str(finished), "--model.method", "LoRA", "--model.recompute", "mlp"]) == 0
    (tmp_path / "training.yaml").write_text(OTHER_TRAINING)
    assert evaluate.main([str(finished), "--config", str(tmp_path / "training.yaml")]) == 0
    again = json.loads((finished / "evaluation.json").read_text())
    assert again["test"]["top1"] == results(finished)["test"]["top1"]


@pytest.mark.parametrize(
    "given",
    [
        ["--model", "visionpeft.tasks.image_classification.ImageClassification"],
        ["--model.method", "visionpeft.methods.lora.LoRA"],
        ["--model.loss", "cross_entropy"],
    ],
)
def test_evaluate_takes_what_was_trained_by_another_of_its_names(finished, given):
    """The method LoRA was refused as another one than LoRA, and so was the loss that the labels had chosen."""
    assert evaluate.main([str(finished), *given]) == 0


def test_every_option_of_a_task_is_of_what_was_trained_of_a_training_or_of_a_test():
    for task in set(tasks.__all__) - {"ImageTask"}:
        named = parameters(task).keys()
        assert named <= TRAINED | OF_TRAINING | OF_TEST, (task, named - TRAINED - OF_TRAINING - OF_TEST)


def test_what_a_limit_leaves_of_the_test_is_said(finished, tmp_path, images, capsys):
    """The table named all images of the split beside an accuracy of two of them."""
    made = run(tmp_path, images, "--trainer.limit_test_batches", "1", "--data.test_batch_size", "2", epochs=1)
    assert results(made)["tested_images"] == 2
    assert "2 of 6 (--trainer.limit_test_batches)" in capsys.readouterr().out
    assert evaluate.main([str(made), "--trainer.limit_test_batches", "1.0"]) == 0
    assert json.loads((made / "evaluation.json").read_text())["tested_images"] == 6
    assert results(finished)["tested_images"] == 6


def test_bins_of_the_calibration_error_are_chosen_for_a_run(finished, tmp_path, images, capsys):
    made = run(tmp_path, images, "--calibration_bins", "20", epochs=1)
    assert results(made)["calibration"]["bins"] == 20
    assert results(finished)["calibration"]["bins"] == 15
    for options, bins in ([], 20), (["--calibration_bins", "7"], 7):
        assert evaluate.main([str(made), *options]) == 0
        assert json.loads((made / "evaluation.json").read_text())["calibration"]["bins"] == bins
    assert evaluate.main([str(made), "--calibration_bins", "0"]) == 2
    assert "--calibration_bins 0 must be at least 1" in capsys.readouterr().err


def test_a_limit_that_leaves_nothing_to_test_is_refused(finished, tmp_path, capsys):
    """It ended in a KeyError. A run of an older version, which wrote 0.5 as 0, says which line to change."""
    assert evaluate.main([str(finished), "--trainer.limit_test_batches", "0"]) == 2
    assert "--trainer.limit_test_batches 0 leaves nothing to test" in capsys.readouterr().err
    made = Path(shutil.copytree(finished, tmp_path / "made"))
    config = made / "config.yaml"
    config.write_text(config.read_text().replace("limit_test_batches: null", "limit_test_batches: 0"))
    told = f"{config} says limit_test_batches: 0, which leaves nothing to test; if a share such as 0.5 was given"
    for command, given in ((evaluate, [str(made)]), (fit, ["--resume", str(made)]), (fit, ["--config", str(config)])):
        assert command.main(given) == 2
        assert told in capsys.readouterr().err
    config.write_text(config.read_text().replace("limit_train_batches: null", "limit_train_batches: 0"))
    assert fit.main(["--resume", str(made)]) == 2
    assert f"{config} says limit_train_batches: 0" in capsys.readouterr().err
    assert evaluate.main([str(made), "--trainer.limit_test_batches", "1.0"]) == 0


def test_overfitting_some_batches_sees_the_same_images_in_each_epoch(tmp_path, images):
    """Lightning puts a sampler of its own in the place of ours, which ended in an AttributeError."""
    seen = []
    step = ImageClassification.training_step

    def watched(task, batch, index):
        seen.append(batch[0])
        return step(task, batch, index)

    with mock.patch.object(ImageClassification, "training_step", watched):
        run(tmp_path, images, "--trainer.overfit_batches", "1", epochs=2)
    assert len(seen) == 2
    assert torch.equal(*seen)


def test_predict_csv(finished, images, tmp_path, capsys):
    output = tmp_path / "out.csv"
    assert predict.main([str(finished), str(images), "--top-k", "2", "--output", str(output)]) == 0
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    assert list(rows[0]) == ["path", "class_1", "probability_1", "class_2", "probability_2"]
    assert sum(row["class_1"] in row["path"] for row in rows) > 20
    assert all(float(row["probability_1"]) >= float(row["probability_2"]) for row in rows)


def test_predict_json_of_one_file(finished, images, tmp_path):
    output = tmp_path / "out.json"
    assert predict.main([str(finished), str(images / "red" / "0.png"), "--output", str(output)]) == 0
    (row,) = json.loads(output.read_text())
    assert sorted(row["classes"]) == sorted(COLOURS)  # fewer than five classes: all of them
    assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-4)


def test_predict_damaged_image(finished, images, tmp_path, capsys):
    folder = draw_images(tmp_path / "mixed", per_class=1)
    (folder / "broken.png").write_bytes(b"no image")
    assert predict.main([str(finished), str(folder)]) == 2
    assert "broken.png" in capsys.readouterr().err
    output = tmp_path / "out.json"
    assert predict.main([str(finished), str(folder), "--skip-corrupt", "--output", str(output)]) == 0
    assert len(json.loads(output.read_text())) == 3


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["nowhere.png"], "nowhere.png does not exist"),
        (["--top-k", "0", "."], "--top-k must be at least 1"),
        (["--output", "x.txt", "."], "must end in .csv or .json"),
        ([], "arguments are required"),
    ],
)
def test_predict_refuses(finished, more, said, capsys):
    assert predict.main([str(finished), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error


def test_unfinished_run_is_refused(finished, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    assert evaluate.main([str(tmp_path)]) == 2
    assert "has not finished" in capsys.readouterr().err
    assert predict.main([str(tmp_path / "none"), "x.png"]) == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_two_runs_have_two_directories(tmp_path, images):
    first, second = (run(tmp_path, images, "--trainer.fast_dev_run", "false", epochs=1) for _ in range(2))
    assert first != second
    assert results(first)["test"] == results(second)["test"]  # same seed, same numbers


def test_last_epoch_can_be_reported(tmp_path, images):
    made = run(tmp_path, images, "--report", "last", epochs=1)
    assert results(made)["reported"] == "last of 1 epochs"


def test_config_of_a_run_runs_again(finished, images, tmp_path):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["model"]["init_args"]["optimisation"]["lr"] == 0.02
    assert fit.main(["--config", str(finished / "config.yaml"), "--output", str(tmp_path)]) == 0
    (again,) = tmp_path.iterdir()
    assert results(again)["test"] == results(finished)["test"]


def test_further_loggers_by_option(tmp_path, images):
    """TensorBoard's files are always there; others are added under their Lightning names."""
    folder = tmp_path / "csv"
    made = run(
        tmp_path / "runs",
        images,
        *("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(folder), "--trainer.logger.name", "mine"),
        epochs=1,
    )
    (written,) = folder.rglob("metrics.csv")
    columns = next(csv.reader(written.open()))
    assert {"train/loss", "val/top1", "test/top1"} <= set(columns)
    assert list((made / "tensorboard").iterdir())
    # What the run was made with stands beside what was measured, once for every logger.
    (kept,) = folder.rglob("hparams.yaml")
    told = yaml.safe_load(kept.read_text())
    assert told["model.method"] == "LoRA"
    assert (told["model.backbone"], told["trainer.max_epochs"], told["data.root"]) == ("test_vit", 1, str(images))
    assert (
        told["model.method.rank"]
        == yaml.safe_load((made / "config.yaml").read_text())["model"]["init_args"]["method"]["init_args"]["rank"]
    )
    assert not [name for name in told if name.startswith(("trainer.logger", "output"))]
    assert yaml.safe_load((made / "tensorboard" / "hparams.yaml").read_text()) == told
    events = EventAccumulator(str(made / "tensorboard")).Reload()
    (session,) = [
        HParamsPluginData.FromString(content).session_start_info
        for content in events.PluginTagToContent("hparams").values()
        if HParamsPluginData.FromString(content).HasField("session_start_info")
    ]
    assert session.hparams["model.method"].string_value == "LoRA"
    assert session.hparams["trainer.max_epochs"].number_value == 1
    assert events.Scalars("hp_metric")[-1].value == pytest.approx(results(made)["test"]["top1"])


def test_a_logger_whose_package_is_missing_is_one_sentence(tmp_path, images, capsys):
    command = [*arguments(images, epochs=1), "--trainer.logger", "WandbLogger", "--output", str(tmp_path)]
    assert fit.main(command) == 2
    assert "wandb" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
