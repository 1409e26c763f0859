"""Segmentation by the names of classes from the command line: tested, tested again, predicted, with other names."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from small_mask_runs import CLASSES, draw_masked
from small_runs import draw_images, results

import visionpeft as vp
from visionpeft import evaluate, fit, predict
from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.data import MaskFolder
from visionpeft.data.segmentation.transforms import MaskedTransform
from visionpeft.serving.lanes import Served
from visionpeft.sharing.model_card import model_card
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.sharing.trained_model import open_run
from visionpeft.tasks import OpenVocabularySegmentation

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = {"ground": ["gray noise", "wall"], "blue": ["blue"], "red": ["a red square"]}
TEMPLATES = ["a photo of a {}.", "a {}."]
MASKCLIP = {"attention": "value", "residual": True, "mlp": True}


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """Images that are longer than those of the CLIP, so that two windows overlap."""
    return draw_masked(tmp_path_factory.mktemp("data") / "squares", count=8, size=(64, 80))


def arguments(masked, *more):
    return [
        *("--config", "scenes_open_vocabulary.yaml", "--data", "MaskFolder", "--data.root", str(masked)),
        *("--data.classes", "[ground, blue, red]", "--data.size", "64", "--data.test_fraction", "0.25"),
        *("--model.names", json.dumps({name: NAMES[name] for name in ("ground", "red")})),
        *("--model.template", json.dumps(TEMPLATES), "--figures", "false", *more),
    ]


def run(output, masked, *more):
    before = set(output.glob("*"))
    assert fit.main([*arguments(masked, *more), "--output", str(output)]) == 0
    (made,) = set(output.glob("*")) - before
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory, masked):
    return run(tmp_path_factory.mktemp("runs"), masked)


def mask_of(model, path):
    """The mask of an image, in windows of the CLIP's own images that overlap by half."""
    side = model.learner.clip.visual.image_size[0]
    transform = MaskedTransform(preprocessing_of(model.learner.clip), 64)
    pixels = transform.normalise(transform.measure(Image.open(path).convert("RGB"))[None])
    with torch.no_grad():
        return vp.predict_masks(model, pixels, window=side, stride=side // 2)[0].numpy()


def by_hand(masked, learner, classes, **options):
    """Masks of the test images, and the mean IoU over them, of the model in Python."""
    model, found = vp.OpenVocabulary(learner, classes, threshold=0.1, **options), {}
    hits, either = np.zeros(3), np.zeros(3)
    for path in MaskFolder(masked, CLASSES, test_fraction=0.25).sources["test"].paths:
        found[path.name] = mask_of(model, path)
        true = np.asarray(Image.open(masked / "masks" / path.name))
        for label in range(3):
            hits[label] += ((true == label) & (found[path.name] == label)).sum()
            either[label] += ((true == label) | (found[path.name] == label)).sum()
    return found, (hits[either > 0] / either[either > 0]).mean()


def zero_shot():
    clip, tokenizer = vp.create_clip("nano_clip")
    return vp.ZeroShot(clip, tokenizer, [name for names in NAMES.values() for name in names], TEMPLATES)


def predicted(run_directory, folder, *arguments):
    assert predict.main([str(run_directory), *map(str, arguments), "--output", str(folder)]) == 0
    return {path.name: np.asarray(Image.open(path)) for path in folder.glob("*.png") if "overlay" not in path.name}


def test_tested_predicted_and_tested_in_another_way(finished, masked, tmp_path):
    found = results(finished)
    assert found["parameters"]["trainable"] == 0
    assert "loss" not in found["test"]
    assert found["open_vocabulary"]["classes"] == NAMES
    learner = zero_shot()
    expected, miou = by_hand(masked, learner, NAMES)
    assert found["test"]["miou"] == pytest.approx(miou, abs=1e-6)
    written = predicted(finished, tmp_path / "masks", *(masked / "images" / name for name in expected))
    assert all(np.array_equal(written[name], mask) for name, mask in expected.items())
    assert len(np.unique(np.concatenate([mask.ravel() for mask in expected.values()]))) > 1

    options = [f"--model.{name}={str(value).lower()}" for name, value in MASKCLIP.items()]
    assert evaluate.main([str(finished), *options]) == 0
    again = json.loads((finished / "evaluation.json").read_text())
    others, other_miou = by_hand(masked, learner, NAMES, **MASKCLIP)
    assert again["test"]["miou"] == pytest.approx(other_miou, abs=1e-6)
    assert any(not np.array_equal(others[name], mask) for name, mask in expected.items())


def test_other_names_and_what_is_shared(finished, masked, tmp_path, capsys):
    """Found by these names alone: nothing is background because it is improbable."""
    image, names = masked / "images" / "00.png", ["a red square", "sea", "cat"]
    written = predicted(finished, tmp_path / "masks", image, "--class-names", ", ".join(names))
    assert "ground" not in capsys.readouterr().out
    clip, tokenizer = vp.create_clip("nano_clip")
    model = vp.OpenVocabulary(vp.ZeroShot(clip, tokenizer, names, TEMPLATES))
    assert np.array_equal(written["00.png"], mask_of(model, image))

    trained = open_run(RunDirectory(finished))
    assert (trained.class_names, trained.model.threshold) == (CLASSES, 0.1)
    with torch.no_grad():
        logits = trained.model(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(trained.answers(logits), trained.model.decide(logits))
    assert not torch.equal(trained.answers(logits), logits.argmax(1))  # of names, not of classes
    with pytest.raises(vp.UnsupportedError, match="squares predicts masks"):
        Served("squares", trained, {})
    description = json.loads((finished / "learner" / "learner.json").read_text())
    assert "image-segmentation" in model_card(description, results(finished), "me/squares").content


def test_texts_of_a_saved_learner(masked, tmp_path):
    """Its context is used, and the run keeps a copy of it."""
    clip, tokenizer = vp.create_clip("nano_clip")
    torch.manual_seed(0)
    coop = vp.CoOp(clip, tokenizer, ["one", "two"], context_length=2)
    vp.save_learner(coop, tmp_path / "coop")
    made = run(tmp_path / "runs", masked, "--model.template", "null", "--model.start", str(tmp_path / "coop"))
    assert results(made)["learner"]["class"] == "CoOp"
    coop.set_class_names([name for names in NAMES.values() for name in names])
    _, miou = by_hand(masked, coop, NAMES)
    assert results(made)["test"]["miou"] == pytest.approx(miou, abs=1e-6)
    shutil.rmtree(tmp_path / "coop")
    assert evaluate.main([str(made)]) == 0
    assert json.loads((made / "evaluation.json").read_text())["test"] == results(made)["test"]


def task(**options):
    open_clip.add_model_config(Path(__file__).parents[1] / "clip_configs")
    return OpenVocabularySegmentation(CLASSES, "open_clip/tiny_clip", pretrained=False, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"names": {"grund": ["wall"]}},
            "no class 'grund'; did you mean ground?; names {} finds each class by its own",
        ),
        ({"names": {"ground": []}}, "class 'ground' has no name"),
        ({"names": {"ground": ["red"]}}, "'red'"),
        ({"template": "a {}", "start": "coop"}, "a saved learner has texts of its own; leave out template, or start"),
        ({"window": 100}, "window 100 is larger than the images of this CLIP, 32 pixels"),
        ({"stride": 65}, "stride 65 must be from 1 to the window, which is 32"),
        ({"threshold": 1.0}, "threshold 1.0 must be in"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(vp.ConfigurationError) as refusal:
        task(**options)
    assert message in str(refusal.value)


def test_its_outputs_are_probabilities_of_classes():
    made = task(names={"ground": ["wall", "sky"]}).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        names = made.model(images).softmax(1)
        found = made(images).exp()
    assert torch.allclose(found, torch.stack([names[:, 0] + names[:, 1], names[:, 2], names[:, 3]], dim=1), atol=1e-6)
    with pytest.raises(vp.ConfigurationError, match="nothing is trained; train SemanticSegmentation"):
        made.training_loss(images, torch.zeros(2, 32, 32, dtype=torch.long))


def test_data_without_masks_is_refused(tmp_path, capsys):
    images = str(draw_images(tmp_path / "classes", per_class=2))
    data = ["--data", "ImageFolder", "--data.root", images, "--data.val_fraction", "0", "--data.test_fraction", "0.5"]
    output = ["--output", str(tmp_path / "runs")]
    assert fit.main(["--config", "scenes_open_vocabulary.yaml", "--model.names", "{}", *data, *output]) == 2
    error = capsys.readouterr().err
    assert "OpenVocabularySegmentation" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
