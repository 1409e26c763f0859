"""Runs of segmentation from the command line: fit, evaluate, predict, resume, share, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_mask_runs import CLASSES, draw_masked, mask_arguments, run_masks
from small_runs import draw_images, failing_in_second_epoch, history_of, results

import visionpeft as vp
from visionpeft import evaluate, fit, predict
from visionpeft.data import ComposedScenes, MaskFolder
from visionpeft.data.segmentation.transforms import MaskedTransform
from visionpeft.runs.cli import CLI
from visionpeft.runs.config_files import shipped_configs
from visionpeft.runs.history import read_history
from visionpeft.serving.lanes import Served
from visionpeft.sharing.hub import save_pretrained
from visionpeft.sharing.model_card import model_card
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.sharing.trained_model import open_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return draw_masked(tmp_path_factory.mktemp("data") / "squares", size=(32, 40))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, masked):
    return run_masks(
        tmp_path_factory.mktemp("runs"), masked, "--model.head.batch_norm", "false", epochs=6, figures=True
    )


def masks_of(run_directory, folder, *files):
    assert predict.main([str(run_directory), *map(str, files), "--output", str(folder)]) == 0
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def test_results_are_those_of_the_masks(finished, masked, tmp_path):
    """mIoU over the test split, counted by hand from the masks that `predict` writes."""
    found = results(finished)
    tested = open_run(RunDirectory(finished))
    assert found["data"]["sizes"] == {"train": 9, "val": 1, "test": 2}
    names = {path.name for path in finished.iterdir()}
    assert names >= {"adapter", "curves.png", "iou_by_class.png", "masks.png", "metrics.csv", "results.json"}
    order = files_tested(masked)
    written = masks_of(finished, tmp_path / "out", *(masked / "images" / name for name in order))
    assert len(written) == 4
    hits, either = np.zeros(3), np.zeros(3)
    for name in order:
        true, predicted = np.asarray(Image.open(masked / "masks" / name)), written[name]
        assert written[name.replace(".png", "_overlay.png")].shape == (32, 40, 3)
        for label in range(3):
            hits[label] += ((true == label) & (predicted == label)).sum()
            either[label] += ((true == label) | (predicted == label)).sum()
    by_class = found["classes_tested"]["iou_by_class"]
    assert list(by_class) == CLASSES == tested.class_names
    seen = either > 0
    iou = np.divide(hits, either, out=np.zeros(3), where=seen)
    assert [by_class[name] for name, one in zip(CLASSES, seen, strict=True) if one] == pytest.approx(iou[seen])
    assert found["test"]["miou"] == pytest.approx(iou[seen].mean(), abs=1e-6)
    assert found["test"]["miou"] > 0.33  # ground alone would be less than .25
    mask = Image.open(tmp_path / "out" / order[0])
    assert mask.mode == "P"
    assert mask.getpalette()[3:6] == [128, 0, 0]


def files_tested(masked):
    """Names of the two test images."""
    return [path.name for path in MaskFolder(masked, CLASSES).sources["test"].paths]


def test_evaluate_and_windows(finished):
    assert evaluate.main([str(finished)]) == 0
    again = json.loads((finished / "evaluation.json").read_text())
    assert again["test"] == results(finished)["test"]
    assert evaluate.main([str(finished), "--model.window", "32", "--model.stride", "8"]) == 0
    slid = json.loads((finished / "evaluation.json").read_text())
    assert slid["measured_on"] == {"window": 32, "stride": 8}
    assert slid["test"]["loss"] != again["test"]["loss"]


def test_resumed_run_equals_uninterrupted(tmp_path, masked):
    """With dropout in the head, its running statistics, random scales and crops."""
    whole = run_masks(tmp_path / "whole", masked, epochs=3)

    with failing_in_second_epoch():
        fit.main([*mask_arguments(masked, epochs=3), "--output", str(tmp_path / "parts")])
    (part,) = (tmp_path / "parts").iterdir()
    assert fit.main(["--resume", str(part)]) == 0
    assert history_of(part) == history_of(whole)
    assert results(part)["test"] == results(whole)["test"]


def test_what_is_shared_says_what_it_is(finished, tmp_path):
    description = vp.read_metadata(finished / "adapter")
    assert description["heads"]["head"]["class"] == "LinearSegmentation"
    assert description["metadata"]["objective"]["labels"] == "masks"
    torch.manual_seed(0)  # of the run, whose backbone has no pretrained weights
    trained = vp.from_pretrained(finished / "adapter")
    save_pretrained(
        trained.model, tmp_path / "shared", class_names=CLASSES, preprocessing=trained.preprocessing,
        metadata=description["metadata"],
    )  # fmt: skip
    torch.manual_seed(0)
    again = vp.from_pretrained(tmp_path / "shared")
    images = torch.randn(1, 3, 32, 40)
    with torch.no_grad():
        assert torch.equal(again.model(images), trained.model(images))
        assert again.answers(again.model(images)).shape == (1, 32, 40)
    assert "image-segmentation" in (tmp_path / "shared" / "README.md").read_text()
    card = model_card(description, results(finished), "me/squares").content
    assert "type: mean_iou" in card
    assert "| LinearSegmentation | layers=1, batch_norm=False, dropout=0.1 |" in card


def test_masks_are_not_served(finished):
    trained = open_run(RunDirectory(finished))
    with pytest.raises(vp.UnsupportedError, match="squares predicts masks"):
        Served("squares", trained, {})


def refusal(main, arguments, capsys):
    assert main([str(each) for each in arguments]) == 2
    return capsys.readouterr().err


def test_images_that_a_backbone_of_one_size_does_not_take_are_told_before_training(masked, tmp_path, capsys):
    """Training squares have its size; images of 32 x 40 do not, windows do, and so do images that are filled up."""
    fixed = ("--model.backbone_kwargs", "{img_size: 32, depth: 2, dynamic_img_size: false}")
    out = ["--output", tmp_path]
    error = refusal(fit.main, [*mask_arguments(masked, *fixed, epochs=1), *out], capsys)
    assert "takes images of 32 x 32 pixels alone, and " in error
    assert "of the val split is seen in 32 x 40; measure in windows of its own size (--model.window 32), or" in error
    assert "epoch 1" not in error
    assert not list(tmp_path.glob("*-*"))
    for fitting in (["--model.window", "32"], ["--trainer.limit_val_batches", "0", "--test", "false"]):
        assert fit.main([*mask_arguments(masked, *fixed, *fitting, epochs=1), *map(str, out)]) == 0
    square = draw_masked(tmp_path / "square", size=(32, 32))
    smaller = mask_arguments(square, *fixed, "--data.test_size", "30", epochs=1)
    assert fit.main([*smaller, *map(str, out)]) == 0


def test_the_loss_that_is_measured_is_of_all_labelled_pixels(finished, masked):
    """One image has few that count: as a mean of the images' means it would weigh as much as another."""
    assert evaluate.main([str(finished), "--data.values", "{0: null, 1: blue, 2: red}"]) == 0
    trained = open_run(RunDirectory(finished))
    transform = MaskedTransform(trained.preprocessing, 32)
    losses, counts = [], []
    for name in files_tested(masked):
        labels = torch.from_numpy(np.asarray(Image.open(masked / "masks" / name)).astype(np.int64))
        image = transform.normalise(transform.measure(Image.open(masked / "images" / name)))
        with torch.no_grad():
            logits = trained.model(image[None]).double()
        kept = torch.where(labels == 0, -100, labels)
        losses.append(torch.nn.functional.cross_entropy(logits, kept[None], reduction="sum").item())
        counts.append((labels != 0).sum().item())
    assert len(set(counts)) > 1
    found = json.loads((finished / "evaluation.json").read_text())["test"]["loss"]
    assert found == pytest.approx(sum(losses) / sum(counts), rel=1e-5)
    of_images = np.mean([loss / count for loss, count in zip(losses, counts, strict=True)])
    assert found != pytest.approx(of_images, rel=1e-4)


def test_masks_without_a_labelled_pixel_are_told_before_training(masked, tmp_path, capsys):
    """Their loss is 0 in every step: the run trained in silence, and only its first measurement ended it."""
    nothing = mask_arguments(masked, "--data.values", "{0: null, 1: null, 2: null}", "--test", "false", epochs=1)
    unmeasured = ["--data.val_fraction", "0", "--output", tmp_path]
    error = refusal(fit.main, [*nothing, *unmeasured], capsys)
    assert "no pixel of the 10 training masks has a class" in error
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused(finished, masked, tmp_path, capsys):
    image = masked / "images" / "00.png"
    assert "must be a folder" in refusal(predict.main, [finished, image, "--output", tmp_path / "a.csv"], capsys)
    assert "would write over" in refusal(predict.main, [finished, image, "--output", masked / "images"], capsys)
    assert "--top-k belongs to" in refusal(predict.main, [finished, image, "--top-k", "3"], capsys)
    other = ["--data.classes", "[ground, red, blue]"]
    assert "class 1 is 'blue', not 'red'" in refusal(evaluate.main, [finished, *other], capsys)
    for head in (["--model.head", "SETR"], ["--model.head.dropout", "0.5"], ["--model.head=SETR"]):
        assert "the head is that of the adapter in" in refusal(evaluate.main, [finished, *head], capsys)
    (tmp_path / "head.yaml").write_text("model: {init_args: {head: {class_path: SETR, init_args: {width: 8}}}}")
    error = refusal(evaluate.main, [finished, "--config", tmp_path / "head.yaml"], capsys)
    assert "--model.head SETR: the head is that of the adapter in" in error
    nothing = ["--data.values", "{0: null, 1: null, 2: null}"]
    error = refusal(evaluate.main, [finished, *nothing], capsys)
    assert "no pixel measured of the test split has a class, all are ignored" in error
    image.with_name("00_overlay.png").write_bytes(image.read_bytes())
    both = [finished, image, image.with_name("00_overlay.png"), "--output", tmp_path / "both"]
    error = refusal(predict.main, both, capsys)
    image.with_name("00_overlay.png").unlink()
    assert "would both be " in error
    assert "both/00_overlay.png; predict them into two folders" in error
    stride = mask_arguments(masked, "--model.stride", "3")
    assert "stride 3 must be from 1 to the window" in refusal(fit.main, [*stride, "--output", tmp_path], capsys)
    images = draw_images(tmp_path / "classes", per_class=2)
    fractions = ("--data.val_fraction", "0", "--data.test_fraction", "0", "--test", "false", "--output", tmp_path)
    classified = ["--config", "images_lora.yaml", "--data", "MaskFolder", "--data.root", masked, "--data.classes"]
    for options in (
        [*classified, "[ground, blue, red]", *fractions],
        ["--config", "scenes_lora.yaml", "--data", "ImageFolder", "--data.root", images, *fractions],
    ):
        error = refusal(fit.main, options, capsys)
        assert "SemanticSegmentation" in error
        assert error.count("\n") == 1
    assert not list(tmp_path.glob("*-*"))


@pytest.mark.parametrize("name", shipped_configs("scenes_"))
def test_shipped_configurations_build_what_they_name(name):
    cli = CLI(["--config", name, "--data.train", "2", "--data.val", "0", "--data.test", "1"])
    assert isinstance(cli.datamodule, ComposedScenes)
    assert cli.model.label.lower() == name.removeprefix("scenes_").removesuffix(".yaml").replace("_", "")
    with torch.no_grad():
        assert cli.model(torch.randn(1, 3, 24, 32)).shape == (1, 8, 24, 32)


def test_head_of_queries(masked, tmp_path, monkeypatch):
    """Its own loss is trained and falls, the cross-entropy of its scores is measured, and it is used again as saved."""
    seen = []
    follow = vp.DensePredictor.set_progress
    monkeypatch.setattr(vp.DensePredictor, "set_progress", lambda model, t: (seen.append(t), follow(model, t))[1])
    options = [f"--model.head.{name}" for name in ("queries=6", "depth=1", "upscale=0", "layers=quarters")]
    options = ["--model.backbone_kwargs", "{img_size: 32, depth: 4}", "--model.head", "PMT", *options]
    run = run_masks(tmp_path, masked, *options, "--model.optimisation.lr", "5e-3", epochs=4)
    assert seen == [pytest.approx(step / 12) for step in range(12)]
    found = results(run)
    assert found["objective"]["loss"] == "mask_classification"
    assert found["head"]["class"] == "PMT"
    history = read_history(run / "metrics.csv")
    assert history[-1]["train/loss"] < 0.9 * history[0]["train/loss"]
    assert 0 < found["test"]["loss"] < 2
    trained = open_run(RunDirectory(run))
    assert not trained.model.training
    pixels = torch.randn(1, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = trained.model.coarse_logits(pixels)
    assert scores.shape == (1, 3, *scores.shape[-2:])
    assert (scores >= 0).all()
    written = masks_of(run, tmp_path / "out", masked / "images" / "00.png")
    assert written["00.png"].shape == (32, 40)
