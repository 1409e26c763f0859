"""Batches of loaders that are not of this package, as torchvision, MedMNIST and Hugging Face data sets give them."""

import pytest
import torch
import torch.nn.functional as F
from test_image_classification import NAMES, Random, make, trainer
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

from visionpeft.data.dataset import Part
from visionpeft.errors import ConfigurationError, DataError
from visionpeft.tasks.batches import images_and_labels, images_of
from visionpeft.tasks.objectives import build_objective
from visionpeft.tasks.several_tasks import OneClassOfTask

IMAGES = torch.zeros(4, 3, 8, 8)
LABELS = torch.tensor([0, 2, 1, 0])


def test_images_that_the_loader_has_mixed(tmp_path):
    """Cross-entropy with the shares; the class with the larger share is the right one."""
    mixed = v2.CutMix(num_classes=len(NAMES), alpha=1.0)
    torch.manual_seed(0)
    pairs = list(zip(Random().images, Random().labels, strict=True))
    batches = [mixed(*default_collate(pairs[first : first + 7])) for first in range(0, 28, 7)]
    loader = DataLoader(batches, batch_size=None)
    task = make()
    measured = trainer(tmp_path)
    (found,) = measured.test(task, loader, verbose=False)
    images, shares = (torch.cat(each) for each in zip(*batches, strict=True))
    with torch.no_grad():
        logits = task.eval()(images)
    assert found["test/loss"] == pytest.approx(F.cross_entropy(logits, shares).item(), abs=1e-5)
    right = (logits.argmax(1) == shares.argmax(1)).float().mean().item()
    assert right > 0
    assert found["test/top1"] == pytest.approx(right)
    measured = trainer(tmp_path)
    measured.fit(task, loader)
    assert measured.callback_metrics["train/top1"] > 0


def test_mixing_what_is_mixed_already_is_refused():
    task = make(mixup=0.2)
    with pytest.raises(ConfigurationError, match="mixed already; set mixup and cutmix to 0"):
        task.training_loss(torch.zeros(2, 3, 32, 32), torch.full((2, 7), 1 / 7))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_whole_numbers_of_any_kind_are_classes(kind):
    read = build_objective("classes", 3).read(LABELS.to(kind), 4)
    assert read.dtype == torch.int64
    assert read.tolist() == LABELS.tolist()


def test_probabilities_are_divided_by_the_number_of_images():
    objective = build_objective("classes", 3, class_weights=[1.0, 2.0, 5.0])
    assert objective.loss_weight(F.one_hot(LABELS).float()) is None
    assert objective.loss_weight(LABELS) == 1 + 5 + 2 + 1


@pytest.mark.parametrize(
    ("kind", "labels", "told"),
    [
        (
            "classes",
            LABELS[:, None],
            r"class indices, whole numbers \(4,\), or probabilities \(4, 3\), and these .*4, 1",
        ),
        ("classes", LABELS.float(), r"these are torch.float32 \(4,\)"),
        ("classes", F.one_hot(LABELS), r"these are torch.int64 \(4, 3\)"),
        ("classes", torch.tensor([[0, 2, 0.3]] * 4), "4 x 3 numbers that are no probabilities"),
        ("classes", torch.tensor([[1.5, -0.5, 0]] * 4), "4 x 3 numbers that are no probabilities"),
        ("classes", LABELS[:3], r"these are torch.int64 \(3,\)"),
        ("classes", LABELS + 1, "has the label 3, and the 3 classes are 0 to 2"),
        ("classes", LABELS - 100, "has the label -100"),
        ("classes", ["a", "b", "a", "b"], "these are a list"),
        ("several", LABELS, r"zeros and ones \(4, 3\), and these are torch.int64 \(4,\)"),
        ("number", LABELS[:, None].float(), r"numbers \(4,\), and these are torch.float32 \(4, 1\)"),
    ],
)
def test_labels_that_are_none(kind, labels, told):
    with pytest.raises(DataError, match=told):
        build_objective(kind, 3).read(labels, 4)


def test_classes_of_several_tasks_have_no_probabilities():
    with pytest.raises(DataError, match=r"class indices, whole numbers \(4,\), and these"):
        OneClassOfTask({"a": 2, "b": 1}).read(torch.full((4, 3), 1 / 3), 4)


def test_of_labels_that_are_mixed_the_larger_share_applies():
    objective = build_objective("several", 3)
    metric = objective.metrics("test")["micro_f1"]
    objective.measure(metric, torch.tensor([[9.0, -9.0, 9.0]]), torch.tensor([[0.7, 0.3, 1.0]]))
    assert metric.compute() == 1


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ({"image": IMAGES, "label": LABELS}, "this one is a dict of image, label; let the loader's collate_fn"),
        ((IMAGES, LABELS, LABELS), "a tuple of 3: Tensor, Tensor, Tensor"),
        ([IMAGES], "a list of 1: Tensor"),
        (IMAGES, "a Tensor"),
        (([IMAGES], LABELS), "a tuple of 2: list, Tensor"),
    ],
)
def test_batches_that_are_no_pairs(batch, told, tmp_path):
    with pytest.raises(DataError, match=told):
        images_and_labels(batch)
    task = make()
    for step in (task.training_step, task.validation_step, task.test_step):
        with pytest.raises(DataError, match="batches must be pairs of images"):
            step(batch, 0)


def test_patches_with_their_places(tmp_path):
    """As timm's NaFlex loader gives them, images of other sizes in each batch."""
    images = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([[row, column] for row in range(2) for column in range(3)]).expand(3, -1, -1)
    patches = torch.nn.functional.unfold(images, 16, stride=16).transpose(1, 2)  # channels first in each patch
    patches = patches.unflatten(2, (3, 256)).transpose(2, 3).flatten(2)  # and last
    inputs = {
        "patches": patches,
        "patch_coord": places,
        "patch_valid": torch.ones(3, 6, dtype=torch.bool),
        "seq_len": 6,
    }
    labels = torch.tensor([0, 4, 6])
    size = {"depth": 1, "embed_dim": 64, "num_heads": 2}
    task = make(backbone="naflexvit_base_patch16_gap", backbone_kwargs=size)
    measured = trainer(tmp_path)
    (found,) = measured.test(task, DataLoader([(inputs, labels)], batch_size=None), verbose=False)
    with torch.no_grad():
        expected = F.cross_entropy(task.eval()(images), labels).item()
    assert found["test/loss"] == pytest.approx(expected, abs=1e-5)
    measured.fit(task, DataLoader([(inputs, labels)], batch_size=None))
    assert images_of([inputs]) is inputs


def test_batches_that_are():
    assert images_and_labels([IMAGES, LABELS]) == (IMAGES, LABELS, None)
    assert images_and_labels((IMAGES, LABELS, Part(2, 4)))[2] == Part(2, 4)
    for batch in (IMAGES, [IMAGES], (IMAGES, LABELS, "where")):
        assert images_of(batch) is IMAGES
    with pytest.raises(DataError, match="begin with them, and this one is a dict of image"):
        images_of({"image": IMAGES})
