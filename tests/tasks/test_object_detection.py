"""Detection learns: from data by method and head to average precision, in a few seconds."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

import visionpeft as vp
from visionpeft.data import ComposedObjects
from visionpeft.data.detection.objects import objects_of
from visionpeft.tasks import ObjectDetection
from visionpeft.tasks.optimisation import Optimisation

pytestmark = pytest.mark.usefixtures("one_thread")
HEAD = vp.FCOS(width=64, convs=1)
BACKBONE = {"backbone": "test_vit", "pretrained": False, "backbone_kwargs": {"img_size": 48}}


def scenes(**options):
    options = {"side": 48, "size": 48, "scale": (1.0, 1.0), "flip": False, "batch_size": 4} | options
    return ComposedObjects(train=4, val=0, test=4, normalisation="half", **options)


def test_objects_that_were_learnt_are_found(monkeypatch):
    """In scenes that were trained on; in others, with as many objects, they are not."""
    data = scenes()
    others, data.sources["test"] = data.sources["test"], data.sources["train"]
    optimisation = Optimisation(lr=3e-3, warmup_epochs=2)
    task = ObjectDetection(vp.LoRA(rank=8), data.class_names, head=HEAD, optimisation=optimisation, **BACKBONE)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=60, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(task, data)
    (found,) = trainer.test(task, data, verbose=False)
    assert found["test/ap"] > 0.5  # .79
    assert found["test/ap50"] >= found["test/ap75"] >= found["test/ap"] - 1e-6
    data.sources["test"] = others
    (elsewhere,) = trainer.test(task, data, verbose=False)
    assert elsewhere["test/ap"] < 0.2
    measured = task.measured["test"]["ap_by_class"]
    assert np.mean([value for value in measured.values() if value is not None]) == pytest.approx(elsewhere["test/ap"])
    monkeypatch.setattr(
        type(others), "objects", lambda self, index: objects_of([], [], masks=np.zeros((0, 48, 48), bool))
    )
    with pytest.raises(vp.DataError, match="none of the 4 images measured of the test split has an object"):
        trainer.test(task, data, verbose=False)


@pytest.mark.parametrize("method", [vp.EVA(rank=2), vp.SPT(budget=2000, samples=4)])
def test_methods_that_look_at_the_data_see_objects(method):
    """Batches by batches, and image by image."""
    data = scenes()
    task = ObjectDetection(method, data.class_names, head=HEAD, **BACKBONE)
    assert task.adapter.pending
    task.connect(data)
    vp.allocate(task.model, task.shown(data), task.loss_of_shown)
    assert not task.adapter.pending
    assert sum(parameter.numel() for parameter in vp.trainable_parameters(task.model)) > 0


def test_what_cannot_be_is_refused():
    data = scenes()
    for options, told in (
        ({"masks": True, "head": HEAD}, "FCOS finds no masks, but masks is true"),
        ({"masks": False, "head": vp.MaskRCNN(width=8)}, "MaskRCNN finds masks, but masks is false"),
    ):
        with pytest.raises(vp.ConfigurationError, match=told):
            ObjectDetection(vp.LoRA(rank=2), data.class_names, **options, **BACKBONE)
    task = ObjectDetection(vp.LoRA(rank=2), data.class_names, head=HEAD, **BACKBONE)
    for precision in ("bf16-true", "16-true"):
        with pytest.raises(vp.ConfigurationError, match=rf"{precision} rounds the corners .*16-mixed, or 32-true"):
            task.objective.check_precision(precision)
    task.objective.check_precision("bf16-mixed")
    with pytest.raises(vp.ConfigurationError, match="detection is not compiled"):
        task.compile_model()
    data.sources["train"].with_masks = False
    task.masks = True
    with pytest.raises(vp.ConfigurationError, match="ComposedObjects has boxes and no masks here"):
        task.connect(data)
    assert task.example().shape == (1, 3, 48, 48)
    assert isinstance(task(torch.zeros(1, 3, 48, 48)), list)
