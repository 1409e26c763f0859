"""Losses, weights and answers of each kind of labels, against formulas in double precision."""

import numpy as np
import pytest
import torch

from visionpeft.errors import ConfigurationError, StorageError
from visionpeft.tasks.metrics import MeanLoss
from visionpeft.tasks.objectives import Asymmetry, build_objective
from visionpeft.tasks.several_tasks import TaskAccuracy

NAMES = ["a", "b", "c"]
GENERATOR = np.random.default_rng(5)
LOGITS = 3 * GENERATOR.standard_normal((7, 3))
ONE = np.array([0, 1, 0, 0, 2, 0, 1])
SEVERAL = (GENERATOR.random((7, 3)) > 0.6).astype(float)


def tensors(*arrays):
    return [torch.tensor(array, dtype=torch.float32) for array in arrays]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_softmax(x):
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def cross_entropy(weights):
    """sum_i w_(y_i) * -log p_(y_i) / sum_i w_(y_i)."""
    weights = np.asarray(weights)[ONE]
    return (weights * -log_softmax(LOGITS)[np.arange(7), ONE]).sum() / weights.sum()


def asymmetric(asymmetry, weights=(1, 1, 1)):
    p = sigmoid(LOGITS)
    q = np.maximum(p - asymmetry.margin, 0)
    positive = -np.asarray(weights) * (1 - p) ** asymmetry.gamma_positive * np.log(p)
    negative = -(q**asymmetry.gamma_negative) * np.log(1 - q)
    return (SEVERAL * positive + (1 - SEVERAL) * negative).mean()


def loss_of(objective, logits=LOGITS, labels=ONE):
    labels = torch.tensor(labels) if labels is ONE else tensors(labels)[0]
    return objective.loss(*tensors(logits), labels).item()


def test_class_weights():
    """n / (K n_k) with counts 4, 2, 1 of 7; every other weighting gives another number."""
    balanced = build_objective("classes", 3, class_weights="balanced")
    balanced.learn(ONE.tolist(), NAMES)
    assert balanced.weights == pytest.approx([7 / 12, 7 / 6, 7 / 3])
    assert loss_of(balanced) == pytest.approx(cross_entropy([7 / 12, 7 / 6, 7 / 3]), rel=1e-5)
    given = build_objective("classes", 3, class_weights=[0.5, 2.0, 3.0])
    assert loss_of(given) == pytest.approx(cross_entropy([0.5, 2, 3]), rel=1e-5)
    plain = build_objective("classes", 3)
    assert loss_of(plain) == pytest.approx(cross_entropy([1, 1, 1]), rel=1e-5)
    assert len({round(loss_of(each), 4) for each in (balanced, given, plain)}) == 3
    # What epochs are compared by is not weighted.
    assert balanced.measured_loss(*tensors(LOGITS), torch.tensor(ONE)).item() == pytest.approx(loss_of(plain))
    assert balanced.describe()["class_weights"] == balanced.weights


def test_mixed_labels_are_weighted_class_by_class():
    weights = np.array([0.5, 2.0, 3.0])
    targets = GENERATOR.dirichlet(np.ones(3), size=7)
    objective = build_objective("classes", 3, class_weights=weights.tolist())
    expected = -(weights * targets * log_softmax(LOGITS)).sum() / 7
    assert objective.mixed_loss(*tensors(LOGITS, targets)).item() == pytest.approx(expected, rel=1e-5)


def test_binary_cross_entropy_and_positive_weights():
    labels = [tuple(np.flatnonzero(row)) for row in SEVERAL]
    counts = SEVERAL.sum(axis=0)
    assert 0 < counts.min() <= counts.max() < 7
    p = sigmoid(LOGITS)
    for given, weights in ((None, np.ones(3)), ([1.0, 2.0, 5.0], [1, 2, 5]), ("balanced", (7 - counts) / counts)):
        objective = build_objective("several", 3, positive_weights=given)
        objective.learn(labels, NAMES)
        expected = -(np.asarray(weights) * SEVERAL * np.log(p) + (1 - SEVERAL) * np.log(1 - p)).mean()
        assert loss_of(objective, labels=SEVERAL) == pytest.approx(expected, rel=1e-5)
    assert objective.answers(*tensors(LOGITS)).numpy() == pytest.approx(p, rel=1e-4)


@pytest.mark.parametrize(
    "asymmetry", [Asymmetry(), Asymmetry(1.0, 4.0, 0.05), Asymmetry(0.0, 0.0, 0.0), Asymmetry(2.0, 1.0, 0.2)]
)
def test_asymmetric_loss(asymmetry):
    objective = build_objective("several", 3, loss="asymmetric", asymmetry=asymmetry)
    assert loss_of(objective, labels=SEVERAL) == pytest.approx(asymmetric(asymmetry), rel=1e-4)
    weighted = build_objective("several", 3, loss="asymmetric", asymmetry=asymmetry, positive_weights=[1.0, 2.0, 5.0])
    assert loss_of(weighted, labels=SEVERAL) == pytest.approx(asymmetric(asymmetry, (1, 2, 5)), rel=1e-4)
    assert objective.describe()["asymmetry"]["margin"] == asymmetry.margin


def test_measured_without_weights():
    for loss, expected in (("asymmetric", asymmetric(Asymmetry())), ("bce", asymmetric(Asymmetry(0.0, 0.0, 0.0)))):
        objective = build_objective("several", 3, loss=loss, positive_weights=[1.0, 2.0, 5.0])
        assert objective.measured_loss(*tensors(LOGITS, SEVERAL)).item() == pytest.approx(expected, rel=1e-4)
        assert loss_of(objective, labels=SEVERAL) > 1.1 * expected


def test_the_default_is_that_of_the_paper():
    objective = build_objective("several", 3, loss="asymmetric")
    assert loss_of(objective, labels=SEVERAL) == pytest.approx(asymmetric(Asymmetry(0.0, 4.0, 0.05)), rel=1e-4)
    assert loss_of(objective, labels=SEVERAL) != pytest.approx(asymmetric(Asymmetry(0.0, 0.0, 0.0)), rel=0.05)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5, 4.0])
def test_gradients_of_certain_labels_are_finite(gamma):
    logits = torch.tensor([[-200.0, 200.0, 0.0]], requires_grad=True)
    labels = torch.tensor([[0.0, 1.0, 1.0]])
    objective = build_objective("several", 3, loss="asymmetric", asymmetry=Asymmetry(gamma, gamma))
    objective.loss(logits, labels).backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("gamma", [0.5, -1.0, float("nan"), float("inf")])
def test_focus_without_a_finite_gradient_is_refused(gamma):
    for name in ("gamma_positive", "gamma_negative"):
        with pytest.raises(ConfigurationError, match=f"asymmetry.{name} must be 0 or at least 1"):
            Asymmetry(**{name: gamma})


@pytest.mark.parametrize(("loss", "power"), [("mse", 2), ("l1", 1)])
def test_numbers_are_learnt_standardised_and_answered_in_their_unit(loss, power):
    numbers = np.array([1990.0, 2001.0, 2010.5, 1995.0])
    outputs = np.array([[0.5], [-1.0], [2.0], [0.0]])
    objective = build_objective("number", 0, loss=loss)
    with pytest.raises(ConfigurationError, match="it has seen none"):
        loss_of(objective, outputs, numbers)
    objective.learn(numbers.tolist(), [])
    mean, deviation = numbers.mean(), numbers.std()
    expected = (abs(outputs[:, 0] - (numbers - mean) / deviation) ** power).mean()
    assert loss_of(objective, outputs, numbers) == pytest.approx(expected, rel=1e-4)
    assert objective.answers(*tensors(outputs)).numpy() == pytest.approx(outputs[:, 0] * deviation + mean, rel=1e-6)
    assert objective.describe() == {
        "labels": "number",
        "loss": loss,
        "mean": pytest.approx(mean),
        "deviation": pytest.approx(deviation),
    }
    other = build_objective("number", 0, loss=loss)
    other.load_state(objective.state())
    assert other.scale == objective.scale
    with pytest.raises(StorageError, match="not one of a task that learns numbers"):
        other.load_state({})


@pytest.mark.parametrize(
    ("labels", "classes", "options", "said"),
    [
        ("classes", 3, {"loss": "bce"}, "loss bce is not one of labels 'classes': use cross_entropy"),
        ("several", 3, {"loss": "mse"}, "use bce or asymmetric"),
        ("number", 0, {"loss": "cross_entropy"}, "use mse or l1"),
        ("several", 3, {"class_weights": "balanced"}, "class_weights belongs to labels 'classes'"),
        ("classes", 3, {"positive_weights": "balanced"}, "positive_weights belongs to labels 'several'"),
        ("several", 3, {"label_smoothing": 0.1}, "label_smoothing belongs to labels 'classes'"),
        ("several", 3, {"asymmetry": Asymmetry()}, "asymmetry belongs to loss asymmetric"),
        ("classes", 3, {"class_weights": [1.0, 2.0]}, "a list of 3 positive numbers"),
        ("classes", 3, {"class_weights": [1.0, 2.0, 0.0]}, "a list of 3 positive numbers"),
        ("several", 3, {"positive_weights": [1.0, 2.0, float("nan")]}, "a list of 3 positive numbers"),
        ("classes", 1, {}, "at least two classes"),
        ("several", 1, {}, "several labels need at least two"),
    ],
)
def test_refused(labels, classes, options, said):
    with pytest.raises(ConfigurationError, match=said):
        build_objective(labels, classes, **options)


def test_weights_that_cannot_be_balanced():
    several = build_objective("several", 3, positive_weights="balanced")
    with pytest.raises(ConfigurationError, match="label 'b' applies to 2 of 2 training images"):
        several.learn([(0, 1), (1, 2)], NAMES)
    classes = build_objective("classes", 3, class_weights="balanced")
    with pytest.raises(ConfigurationError, match="class 'c' has no training image"):
        classes.learn([0, 1], NAMES)
    with pytest.raises(ConfigurationError, match="train with a data module"):
        loss_of(classes)


def test_pixels_are_measured_as_torchmetrics_measures_them():
    """Over batches together, without ignored pixels and without the class that is neither labelled nor found."""
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    from visionpeft.tasks.segmentation_objective import ClassOfPixels

    torch.manual_seed(0)
    found, labels = torch.randint(4, (3, 2, 6, 5)), torch.randint(-1, 4, (3, 2, 6, 5))
    ours = ClassOfPixels(5).metrics("train")
    theirs = {
        "miou": MulticlassJaccardIndex(5, average="macro", ignore_index=-1),
        "pixel_accuracy": MulticlassAccuracy(5, average="micro", ignore_index=-1),
    }
    for name, metric in ours.items():
        for batch in range(3):
            metric.update(found[batch], labels[batch])
            theirs[name].update(found[batch], labels[batch])
        assert metric.compute().item() == pytest.approx(theirs[name].compute().item(), abs=1e-6)
        counted = type(theirs[name])(5, average=theirs[name].average)
        counted.update(found, labels.clamp(min=0))
        assert metric.compute().item() != pytest.approx(counted.compute().item(), abs=1e-3)  # ignored pixels would show
        for each in (metric, theirs[name]):  # without a labelled pixel
            each.reset()
            each.update(found[0], torch.full_like(labels[0], -1))
        assert metric.compute().item() == pytest.approx(theirs[name].compute().item(), nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_many_losses_in_half_precision(dtype):
    """bfloat16 counts to 256 and float16 to 2048; a sum in them stands still, and 2 became 4."""
    task = torch.nn.ModuleList([MeanLoss(), TaskAccuracy([0, 2], [2, 3])]).to(dtype)
    mean, accuracy = task
    for step in range(5000):
        mean.update(torch.tensor(1.0 if step % 2 else 3.0, dtype=dtype), 1)
        # three of four right of the first task, every one of the second
        logits = torch.eye(5, dtype=dtype)[[0, 1, 0, 0, 2, 4]]
        accuracy.update(logits, torch.tensor([0, 1, 0, 1, 2, 4]))
    assert mean.compute().dtype == torch.float32
    assert mean.compute() == 2
    assert accuracy.compute() == 0.875
    mean.reset()
    task.to(dtype)
    mean.update(torch.tensor(3.0), 7)
    assert mean.compute() == 3
    assert mean.to("meta").total.device.type == "meta"
