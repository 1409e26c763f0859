"""Runs of segmentation and detection on backbones in stages: fit, evaluate, predict, and what a run reads again."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_mask_runs import draw_masked, run_masks
from small_object_runs import run_objects
from small_runs import results

from visionpeft import evaluate, predict
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.sharing.trained_model import open_run

pytestmark = pytest.mark.usefixtures("one_thread")

SWIN = "{img_size: 32, embed_dim: 8, depths: [1, 1, 1, 1], num_heads: [1, 2, 2, 4], window_size: 4}"
CONVNEXT = "{dims: [8, 12, 16, 24], depths: [1, 1, 1, 1]}"


def test_upernet_on_swin(tmp_path):
    """Images of 40 x 44 pixels, of which the last stage has 2 x 2 places: as a whole, and in windows."""
    masked = draw_masked(tmp_path / "squares", size=(40, 44))
    backbone = ("--model.backbone", "swin_tiny_patch4_window7_224", "--model.backbone_kwargs", SWIN)
    head = ("--config", "heads/upernet.yaml", "--model.head.width", "8")
    short = ("--data.batch_size", "3", "--trainer.max_epochs", "1")
    run = run_masks(tmp_path / "runs", masked, *backbone, *head, *short)
    found = results(run)
    assert found["head"]["class"] == "UPerNet"
    assert found["head"]["arguments"]["channels"] == [8, 16, 32, 64]
    assert evaluate.main([str(run), "--model.window", "44"]) == 0  # the whole image
    assert json.loads((run / "evaluation.json").read_text())["test"]["loss"] == pytest.approx(
        found["test"]["loss"], rel=1e-4
    )
    assert evaluate.main([str(run), "--model.window", "32"]) == 0
    assert json.loads((run / "evaluation.json").read_text())["test"]["loss"] != pytest.approx(
        found["test"]["loss"], rel=1e-4
    )
    image = masked / "images" / "00.png"
    assert predict.main([str(run), str(image), "--output", str(tmp_path / "out")]) == 0
    written = np.asarray(Image.open(tmp_path / "out" / "00.png"))
    assert written.shape == (40, 44)
    assert set(np.unique(written)) <= {0, 1, 2}
    model = open_run(RunDirectory(run)).model
    with torch.no_grad():
        assert model(torch.randn(1, 3, 40, 44)).shape == (1, 3, 40, 44)


def test_fcos_on_convnext(tmp_path):
    backbone = ("--model.backbone", "convnext_atto", "--model.backbone_kwargs", CONVNEXT)
    run = run_objects(tmp_path, *backbone, "--model.method.targets", "[fc1, fc2]", epochs=1)
    found = results(run)
    assert found["head"]["arguments"]["strides"] == [8, 16, 32]
    assert 0 <= found["test"]["ap"] <= 1
