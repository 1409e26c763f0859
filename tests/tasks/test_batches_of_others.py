"""Batches of loaders that are not of this package, as torchvision, MedMNIST and Hugging Face data sets give them."""

import pytest
import torch
import torch.nn.functional as F
from test_image_classification import NAMES, Random, make, trainer
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

import visionpeft as vp
from visionpeft.data.dataset import Part
from visionpeft.errors import ConfigurationError, DataError
from visionpeft.tasks import ObjectDetection, SemanticSegmentation
from visionpeft.tasks.batches import images_and_labels, images_of
from visionpeft.tasks.checkpointing import DivergedError
from visionpeft.tasks.objectives import build_objective
from visionpeft.tasks.segmentation_objective import ClassOfPixels
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


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint64, torch.int64])
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
        (
            "several",
            torch.tensor([[1.0, 0, -1]] * 4),
            "a batch has the label -1, and several labels are zeros and ones",
        ),
        ("several", torch.tensor([[1.0, 0, torch.nan]] * 4), "a batch has the label nan"),
        ("number", torch.tensor([1.0, torch.nan, 0, 2]), "a label that is no finite number"),
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


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), "must be floating-point numbers, .* these are torch.uint8"),
        (torch.zeros(4, 32, 32, 3), r"these are torch.float32 \(4, 32, 32, 3\), with the channels last"),
        (torch.zeros(4, 3, 32, 32).double(), "images of a batch are torch.float64"),
        (
            torch.full((4, 3, 32, 32), torch.nan),
            "4 of the 4 images of a batch, the first at 0, have pixels that are no",
        ),
    ],
)
def test_images_that_no_backbone_takes(images, told, tmp_path):
    with pytest.raises(DataError, match=told):
        trainer(tmp_path).fit(make(), DataLoader([(images, LABELS)], batch_size=None))


def test_images_of_one_column_and_of_many_channels_are_images():
    for shape in ((4, 3, 32, 1), (4, 1, 32, 3), (4, 3, 3, 3), (4, 13, 32, 32)):
        assert images_of(torch.zeros(shape)).shape == shape


def test_a_loss_that_diverged_on_good_images_is_no_fault_of_theirs(tmp_path):
    task = make()
    with torch.no_grad():
        vp.trainable_parameters(task.model)[-1].fill_(torch.nan)
    with pytest.raises(DivergedError, match="lower the learning rate"):
        trainer(tmp_path).fit(task, DataLoader([(torch.randn(4, 3, 32, 32), LABELS)], batch_size=None))


@pytest.mark.parametrize("kind", [torch.uint8, torch.uint16, torch.int32, torch.int64])
def test_masks_of_any_whole_numbers_are_measured_alike(kind, tmp_path):
    """Of 8 bits, the place of class 140 of 150 in a table of all classes is more than fits into them."""
    torch.manual_seed(0)
    masks = torch.randint(150, (2, 32, 32))
    task = SemanticSegmentation(vp.LoRA(rank=2), [f"{i}" for i in range(150)])
    loader = DataLoader([(torch.randn(2, 3, 32, 32), masks.to(kind))], batch_size=None)
    (found,) = trainer(tmp_path).test(task, loader, verbose=False)
    with torch.no_grad():
        classes = task.eval().predict_step(loader.dataset[0], 0)
    shares = [((classes == k) & (masks == k)).sum() / ((classes == k) | (masks == k)).sum() for k in range(150)]
    assert found["test/miou"] == pytest.approx(float(sum(shares) / 150), abs=1e-6)
    trainer(tmp_path).fit(task, loader)


@pytest.mark.parametrize(
    ("masks", "told"),
    [
        (
            torch.zeros(4, 1, 8, 8, dtype=torch.long),
            r"whole numbers \(4, height, width\), and these are .* \(4, 1, 8, 8\)",
        ),
        (torch.zeros(4, 8, 8), "these are torch.float32"),
        (
            torch.full((4, 8, 8), 255, dtype=torch.uint8),
            "the class 255, and the 3 classes are 0 to 2, with -1 for pixels",
        ),
        (torch.full((4, 8, 8), -100), "the class -100"),
        ([torch.zeros(8, 8)] * 4, "these are list"),
    ],
)
def test_masks_that_are_none(masks, told):
    with pytest.raises(DataError, match=told):
        ClassOfPixels(3).read(masks, 4)
    task = SemanticSegmentation(vp.LoRA(rank=2), ["a", "b", "c"])
    for step in (task.training_step, task.validation_step, task.test_step):
        with pytest.raises(DataError, match="mask"):
            step((torch.zeros(4, 3, 8, 8), masks), 0)


def test_pixels_that_do_not_count_may_be_in_masks():
    masks = torch.tensor([[[-1, 2], [0, 1]]])
    assert ClassOfPixels(3).read(masks, 1).equal(masks)


def test_targets_of_objects_as_another_package_has_them():
    task = ObjectDetection(vp.LoRA(rank=2), ["a", "b"], head=vp.FCOS(width=64))
    boxes, labels = torch.tensor([[1.0, 1, 9, 9]]), torch.tensor([0])
    for targets, told in (
        ([{"boxes": boxes, "category": labels}], "lack labels, and have boxes, category"),
        (
            {"boxes": boxes, "labels": labels},
            "a list with a dict of boxes, labels for each image, and this one is a dict",
        ),
    ):
        with pytest.raises(DataError, match=told):
            task.training_step((torch.zeros(1, 3, 32, 32), targets), 0)
    with pytest.raises(DataError, match="lack size, truth, and have boxes, labels"):
        task.validation_step((torch.zeros(1, 3, 32, 32), [{"boxes": boxes, "labels": labels}]), 0)


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
