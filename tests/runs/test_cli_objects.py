"""Runs of detection from the command line: fit, evaluate, predict, resume, share, and what is refused."""

import json

import pytest
import torch
from PIL import Image
from small_object_runs import COMPOSED, FCOS, MASKS, NUMBERS, as_coco, object_arguments, run_objects
from small_runs import draw_images, failing_in_second_epoch, history_of, results

import visionpeft as vp
from visionpeft import evaluate, fit, predict
from visionpeft.data import ComposedObjects
from visionpeft.data.detection.outlines import decoded
from visionpeft.data.detection.transforms import ObjectTransform
from visionpeft.data.images import open_image
from visionpeft.data.segmentation.composed_scenes import compose
from visionpeft.runs.cli import CLI
from visionpeft.runs.config_files import shipped_configs
from visionpeft.runs.history import read_history
from visionpeft.serving.lanes import Served
from visionpeft.sharing.model_card import model_card
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.sharing.trained_model import open_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Of files of annotations."""
    data = as_coco(tmp_path_factory.mktemp("data") / "boats")
    deep = ("--model.backbone_kwargs", "{img_size: 32, depth: 6}")  # enough of them to learn in so few steps
    return run_objects(tmp_path_factory.mktemp("runs"), *deep, head=MASKS, data=data, figures=True)


def test_a_run_leaves_what_it_has_measured(finished):
    found = results(finished)
    assert found["data"]["sizes"] == {"train": 8, "val": 2, "test": 4}
    assert {"ap", "ap50", "ap75", "mask_ap", "mask_ap50", "mask_ap75", "loss"} <= set(found["test"])
    assert set(found["classes_tested"]["ap_by_class"]) == set(ComposedObjects(train=1, test=1).class_names)
    assert found["head"]["class"] == "MaskRCNN"
    rows = read_history(finished / "metrics.csv")
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert "val/mask_ap" in rows[0]
    names = {path.name for path in finished.iterdir()}
    assert names >= {"adapter", "curves.png", "ap_by_class.png", "objects.png", "metrics.csv", "results.json"}
    assert found["data"]["category_ids"] == NUMBERS


def test_the_same_scenes_measure_the_same(finished):
    """Also where they are composed, and not read from files."""
    for data in ((), ("--data", "ComposedObjects", *COMPOSED)):
        assert evaluate.main([str(finished), *data]) == 0
        again = json.loads((finished / "evaluation.json").read_text())
        assert again["data"]["dataset"] == ("ComposedObjects" if data else "CocoDetection")
        assert again["test"] == pytest.approx(results(finished)["test"])
    assert again["test"]["loss"] > 0


def test_predictions_are_results_of_coco(finished, tmp_path):
    (tmp_path / "images").mkdir()
    for number, size in ((7, (64, 48)), (30, (48, 96))):
        compose("test", number, 48, 0)[0].resize(size).save(tmp_path / "images" / f"{number:04d}.png")
    arguments = [str(finished), str(tmp_path / "images"), "--output", str(tmp_path / "out"), "--threshold", "0.1"]
    assert predict.main(arguments) == 0
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    about = json.loads((tmp_path / "out" / "images.json").read_text())
    assert [(image["id"], image["width"], image["height"]) for image in about["images"]] == [(7, 64, 48), (30, 48, 96)]
    assert [entry["id"] for entry in about["categories"]] == NUMBERS
    trained = open_run(RunDirectory(finished))
    assert {result["image_id"] for result in found} == {7, 30}
    for result in found:
        x, y, width, height = result["bbox"]
        image = next(each for each in about["images"] if each["id"] == result["image_id"])
        assert 0 <= x <= x + width <= image["width"] + 0.01
        assert 0 <= y <= y + height <= image["height"] + 0.01
        assert result["category_id"] in NUMBERS
        mask = decoded(result["segmentation"], (image["height"], image["width"]))
        rows, columns = mask.nonzero()  # within the box, to a pixel
        assert not len(rows) or (columns.min() >= x - 1.01 and columns.max() <= x + width + 1.01)
    with torch.no_grad():
        pixels = ObjectTransform(trained.preprocessing, trained.size).measure(
            open_image(tmp_path / "images" / "0007.png")
        )
        normalised = pixels / 255 - torch.tensor(trained.preprocessing.mean).view(3, 1, 1)
        normalised /= torch.tensor(trained.preprocessing.std).view(3, 1, 1)
        (own,) = trained.model(normalised[None], [(48, 64)])
    first = [result for result in found if result["image_id"] == 7]
    assert [result["category_id"] for result in first] == [NUMBERS[label] for label in own["labels"]]
    assert [result["score"] for result in first] == pytest.approx(own["scores"].tolist(), abs=1e-5)
    overlays = [Image.open(tmp_path / "out" / f"{number}.png").size for number in ("0007", "0030")]
    assert overlays == [(448, 336), (240, 480)]  # enlarged, so that texts can be read


def test_resumed_run_equals_uninterrupted(tmp_path):
    """With regions drawn at random, random scales and cuts."""
    whole = run_objects(tmp_path / "whole", head=MASKS)

    with failing_in_second_epoch():
        fit.main([*object_arguments(head=MASKS), "--output", str(tmp_path / "parts")])
    (part,) = (tmp_path / "parts").iterdir()
    assert fit.main(["--resume", str(part)]) == 0
    assert history_of(part) == history_of(whole)
    assert results(part)["test"] == results(whole)["test"]


def test_what_is_shared_says_what_it_is(finished):
    description = vp.read_metadata(finished / "adapter")
    torch.manual_seed(0)  # of the run, whose backbone has no pretrained weights
    trained = vp.from_pretrained(finished / "adapter")
    assert isinstance(trained.model, vp.ObjectDetector)
    with torch.no_grad():
        (found,) = trained.answers(trained.model(torch.randn(1, 3, 32, 40)))
    assert found["masks"].shape[1:] == (32, 40)
    card = model_card(description, results(finished), "me/scenes").content
    assert "pipeline_tag: object-detection" in card
    assert "type: ap" in card
    with pytest.raises(vp.UnsupportedError, match="boats predicts objects"):
        Served("boats", open_run(RunDirectory(finished)), {})


def refusal(main, arguments, capsys):
    assert main([str(each) for each in arguments]) == 2
    return capsys.readouterr().err


def wide_objects(folder):
    """Two files of annotations of an image each, of 60 x 40 pixels."""
    folder.mkdir()
    for name in "ab":
        Image.new("RGB", (60, 40)).save(folder / f"{name}.png")
        content = {
            "images": [{"id": 1, "file_name": f"{name}.png", "width": 60, "height": 40}],
            "categories": [{"id": 1, "name": "boat"}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20]}],
        }
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_what_does_not_fit_is_refused(finished, tmp_path, capsys):
    image = tmp_path / "image.png"
    compose("test", 0, 48, 0)[0].save(image)
    assert "must be a folder" in refusal(predict.main, [finished, image, "--output", tmp_path / "a.csv"], capsys)
    assert "would write over" in refusal(predict.main, [finished, image, "--output", tmp_path], capsys)
    assert "--top-k belongs to" in refusal(predict.main, [finished, image, "--top-k", "3"], capsys)
    threshold = [finished, "--model.head.score_threshold", "0.9"]
    assert "the head is that of the adapter in" in refusal(evaluate.main, threshold, capsys)
    out = ["--output", tmp_path]
    half = object_arguments("--trainer.precision", "bf16-true")
    assert "precision bf16-true rounds the corners of objects" in refusal(fit.main, [*half, *out], capsys)
    wide = ("--data", "CocoDetection", "--data.root", str(wide_objects(tmp_path / "wide")), "--data.train", "a.json")
    wide = (*wide, "--data.val", "b.json", "--test", "false", "--data.size", "32")
    fixed = "{img_size: 32, depth: 2, dynamic_img_size: false}"
    error = refusal(fit.main, [*object_arguments("--model.backbone_kwargs", fixed, data=wide), *out], capsys)
    assert "of the val split is seen in 32 x 48; take a backbone that takes images of any size" in error
    several = object_arguments("--model.masks", "true", head=FCOS)
    assert "FCOS finds no masks, but masks is true" in refusal(fit.main, [*several, *out], capsys)
    images = draw_images(tmp_path / "classes", per_class=2)
    folder = ["--data", "ImageFolder", "--data.root", images, "--data.val_fraction", "0", "--data.test_fraction", "0"]
    for config, data in (("objects_detection.yaml", folder), ("scenes_lora.yaml", ["--data", "ComposedObjects"])):
        error = refusal(fit.main, ["--config", config, *data, "--test", "false", *out], capsys)
        assert "objects are learnt by ObjectDetection" in error
        assert error.count("\n") == 1
    assert not list(tmp_path.glob("*-*"))


@pytest.mark.parametrize("name", shipped_configs("objects_"))
def test_shipped_configurations_build_what_they_name(name):
    cli = CLI(["--config", name, "--data.train", "2", "--data.val", "0", "--data.test", "1"])
    assert isinstance(cli.datamodule, ComposedObjects)
    assert cli.model.masks == (name == "objects_instances.yaml")
    with torch.no_grad():
        (found,) = cli.model.eval()(torch.randn(1, 3, 24, 32))
    assert ("masks" in found) == cli.model.masks
