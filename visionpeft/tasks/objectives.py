"""What is learnt of an image: one class, several labels or a number."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from timm.loss import AsymmetricLossMultiLabel
from torch import Tensor
from torchmetrics import MeanAbsoluteError, Metric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)

from visionpeft.data.labels import Labels, class_counts, moments
from visionpeft.errors import ConfigurationError, DataError, StorageError
from visionpeft.tasks.objective import Loss, Objective, Shown, Weights, beside, checked, unknown_class

ROUNDED = 0.02  # of a sum of probabilities in half precision
LOSSES: dict[Labels, tuple[Loss, ...]] = {
    "classes": ("cross_entropy",),
    "several": ("bce", "asymmetric"),
    "number": ("mse", "l1"),
}


@dataclass(frozen=True)
class Asymmetry:
    """The asymmetric loss: a label that applies costs -(1 - p)^g log p, another one -q^h log(1 - q), q = max(p - m, 0).

    Ridnik et al. 2021, "Asymmetric Loss For Multi-Label Classification" (arXiv 2009.14119); computed by timm.

    Args:
        gamma_positive: g, the focus on labels that apply and are not found; 0 or at least 1.
        gamma_negative: h, the focus on labels that do not apply and are found; 0 or at least 1.
        margin: m, the probability up to which a label that does not apply costs nothing.
    """

    gamma_positive: float = 0.0
    gamma_negative: float = 4.0
    margin: float = 0.05

    def __post_init__(self):
        for name in ("gamma_positive", "gamma_negative"):
            value = getattr(self, name)
            # Between 0 and 1 the gradient is infinite where a label is certain, times 0: not a number.
            if not (value == 0 or 1 <= value < float("inf")):
                raise ConfigurationError(f"asymmetry.{name} must be 0 or at least 1, not {value}")
        if not 0 <= self.margin < 1:
            raise ConfigurationError(f"asymmetry.margin must be at least 0 and less than 1, not {self.margin}")


class OneClass(Objective):
    """One class of K: cross-entropy.

    Labels may also be probabilities, as those of images that a loader has mixed (torchvision's CutMix and MixUp). Such
    an image counts as one of its most probable class when accuracy is measured.

    Args:
        num_classes: K.
        label_smoothing: probability mass spread evenly over all classes.
        weights: weight of the images of each class in the training loss, (K,), or "balanced": n / (K n_k) for n_k of n
            images of class k. A batch's loss is the weighted mean.
    """

    labels = "classes"
    loss_name = "cross_entropy"
    monitor = "top1"
    shown = Shown("top1", "top-1", "top-1 accuracy", percentage=True)
    takes_probabilities = True

    def __init__(self, num_classes: int, label_smoothing: float = 0.0, weights: Weights = None):
        if num_classes < 2:
            raise ConfigurationError(f"classification needs at least two classes, the data has {num_classes}")
        self.outputs = num_classes
        self.label_smoothing = label_smoothing
        self.given = checked(weights, num_classes, "class_weights")
        self.weights = None if weights == "balanced" else self.given

    def learn(self, labels: Sequence[int], class_names: Sequence[str]) -> None:
        """Balance the weights."""
        if self.given != "balanced":
            return
        counts = class_counts(labels, self.outputs)
        if 0 in counts:
            raise ConfigurationError(
                f"class_weights balanced: class '{class_names[counts.index(0)]}' has no training image; give a list of "
                f"{self.outputs} weights"
            )
        self.weights = [sum(counts) / (len(counts) * count) for count in counts]

    def read(self, labels: Tensor, images: int) -> Tensor:
        """Class indices int64 (batch,), or probabilities float32 (batch, classes)."""
        if self.takes_probabilities and _fits(labels, (images, self.outputs)) and labels.is_floating_point():
            labels = labels.float()
            # As below, only where nobody waits. Kornia's MixUp gives two classes and a share, three numbers, too.
            if labels.device.type == "cpu" and ((labels < 0).any() or ((labels.sum(1) - 1).abs() > ROUNDED).any()):
                raise DataError(
                    f"labels of a batch are {images} x {self.outputs} numbers that are no probabilities: each image's "
                    "must be from 0 to 1 and sum to 1"
                )
            return labels
        if not _fits(labels, (images,)) or labels.is_floating_point() or labels.dtype == torch.bool:
            more = f", or probabilities ({images}, {self.outputs})" if self.takes_probabilities else ""
            raise _unlike(labels, f"class indices, whole numbers ({images},){more}")
        labels = labels.long()  # of unsigned ones of more than 8 bits PyTorch knows no smallest
        if (wrong := unknown_class(labels, self.outputs)) is not None:
            raise DataError(
                f"a batch has the label {wrong}, and the {self.outputs} classes are 0 to {self.outputs - 1}; "
                "leave out images without a class"
            )
        return labels

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy; `labels` are class indices (batch,) or probabilities (batch, classes)."""
        weights = beside(logits, self.given, self.weights, "class_weights")
        return F.cross_entropy(logits, labels, weight=weights, label_smoothing=self.label_smoothing)

    def loss_weight(self, labels: Tensor) -> Tensor | None:
        """The sum of the weights of a batch's images, if they have any."""
        # By probabilities, as by mixed labels, the sum is divided by the number of images.
        if self.given is None or labels.is_floating_point():
            return None
        return labels.new_tensor(self.weights, dtype=torch.float32)[labels].sum()

    def mixed_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy with probabilities (batch, classes), which are smoothed already."""
        weights = beside(logits, self.given, self.weights, "class_weights")
        return F.cross_entropy(logits, targets, weight=weights, label_smoothing=0.0)

    def measured_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(logits, labels)

    def metrics(self, split: str) -> dict[str, Metric]:
        """Top-1 accuracy, and of more than five classes top-5 accuracy."""
        # Labels outside the classes are refused by the loss already, so the metrics need not look at them once more.
        found = {"top1": MulticlassAccuracy(self.outputs, average="micro", validate_args=False)}
        if self.outputs > 5:
            found["top5"] = MulticlassAccuracy(self.outputs, top_k=5, average="micro", validate_args=False)
        return found

    def measure(self, metric: Metric, logits: Tensor, labels: Tensor) -> None:
        """Add a batch; of probabilities the most probable class is the right one."""
        metric.update(logits, labels.argmax(dim=-1) if labels.is_floating_point() else labels)

    def answers(self, logits: Tensor) -> Tensor:
        """Class probabilities (batch, classes)."""
        return logits.softmax(dim=-1)

    def describe(self) -> dict:
        """Labels, loss and weights."""
        return super().describe() | ({"class_weights": self.weights} if self.given else {})

    def load_description(self, description: dict) -> None:
        """Take the weights of the training."""
        self.weights = description.get("class_weights", self.weights)


class SeveralLabels(Objective):
    """Which of K labels apply, each by itself: binary cross-entropy or asymmetric loss, mean over batch and labels.

    Args:
        num_classes: K.
        loss: "bce" or "asymmetric".
        asymmetry: of the second.
        weights: weight of each label where it applies, (K,), or "balanced": (n - n_k) / n_k for n_k of n images to
            which label k applies.
    """

    labels = "several"
    monitor = "macro_map"
    shown = Shown("micro_f1", "micro F1", "micro F1", percentage=True)

    def __init__(self, num_classes: int, loss: Loss, asymmetry: Asymmetry, weights: Weights = None):
        if num_classes < 2:
            raise ConfigurationError(
                f"several labels need at least two, the data has {num_classes}; whether one applies is a question of "
                "two classes"
            )
        self.outputs = num_classes
        self.loss_name = loss
        self.asymmetry = asymmetry
        self.given = checked(weights, num_classes, "positive_weights")
        self.weights = None if weights == "balanced" else self.given

    def learn(self, labels: Sequence[tuple[int, ...]], class_names: Sequence[str]) -> None:
        """Balance the weights."""
        if self.given != "balanced":
            return
        counts, total = class_counts(labels, self.outputs), len(labels)
        for name, count in zip(class_names, counts, strict=True):
            if count in (0, total):
                raise ConfigurationError(
                    f"positive_weights balanced: label '{name}' applies to {count} of {total} training images; give a "
                    f"list of {self.outputs} weights"
                )
        self.weights = [(total - count) / count for count in counts]

    def read(self, labels: Tensor, images: int) -> Tensor:
        """Zeros and ones (batch, labels), or shares between them."""
        if not _fits(labels, (images, self.outputs)):
            raise _unlike(labels, f"zeros and ones ({images}, {self.outputs})")
        # As of classes, only where nobody waits. The loss would take any number and have no lower bound.
        if labels.device.type == "cpu" and not ((numbers := labels.double()) >= 0).logical_and(numbers <= 1).all():
            wrong = numbers[~((numbers >= 0) & (numbers <= 1))][0].item()
            raise DataError(
                f"a batch has the label {wrong:g}, and several labels are zeros and ones, or shares between them; say "
                "whether a label that is unknown applies, or leave the image out"
            )
        return labels

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss; `labels` are zeros and ones (batch, labels)."""
        return self._loss(logits, labels, beside(logits, self.given, self.weights, "positive_weights"))

    def measured_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss without weights."""
        return self._loss(logits, labels, None)

    def _loss(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        labels = labels.to(logits.dtype)
        if self.loss_name == "bce":
            return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights)
        function = AsymmetricLossMultiLabel(
            gamma_neg=self.asymmetry.gamma_negative,
            gamma_pos=self.asymmetry.gamma_positive,
            clip=self.asymmetry.margin,
            reduction="mean",
            pos_weight=weights,
        )
        return function(logits, labels)

    def metrics(self, split: str) -> dict[str, Metric]:
        """F1 of labels found at a probability of one half; outside training, mean average precision.

        The latter keeps all outputs of an epoch.
        """
        found: dict[str, Metric] = {
            f"{average}_f1": MultilabelF1Score(self.outputs, average=average) for average in ("micro", "macro")
        }
        if split != "train":
            found["macro_map"] = MultilabelAveragePrecision(self.outputs, average="macro", thresholds=None)
        return found

    def measure(self, metric: Metric, logits: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        metric.update(logits.sigmoid(), (labels >= 0.5).long())  # of mixed images the larger share counts

    def answers(self, logits: Tensor) -> Tensor:
        """The probability of each label (batch, labels)."""
        return logits.sigmoid()

    def describe(self) -> dict:
        """Labels, loss and weights."""
        return (
            super().describe()
            | ({"asymmetry": asdict(self.asymmetry)} if self.loss_name == "asymmetric" else {})
            | ({"positive_weights": self.weights} if self.given else {})
        )

    def load_description(self, description: dict) -> None:
        """Take the weights of the training."""
        self.weights = description.get("positive_weights", self.weights)


class Number(Objective):
    """A number: mean squared or absolute error of (y - mean) / deviation, both of the training labels.

    Args:
        loss: "mse" or "l1".
    """

    labels = "number"
    outputs = 1
    monitor = "mae"
    mode = "min"
    shown = Shown("mae", "MAE", "mean absolute error", percentage=False)
    rounded = "the numbers to learn to two or three digits"

    def __init__(self, loss: Loss):
        self.loss_name = loss
        self.scale: tuple[float, float] | None = None

    @property
    def mean_and_deviation(self) -> tuple[float, float]:
        """Of the training labels.

        Raises:
            ConfigurationError: none have been seen.
        """
        if self.scale is None:
            raise ConfigurationError(
                "the outputs of a task that learns numbers are in standard deviations of its training labels, and it "
                "has seen none: train it with a data module, or load what was trained"
            )
        return self.scale

    def learn(self, labels: Sequence[float], class_names: Sequence[str]) -> None:
        """Take mean and standard deviation."""
        self.scale = moments(labels)

    def read(self, labels: Tensor, images: int) -> Tensor:
        """Numbers (batch,)."""
        if not _fits(labels, (images,)):  # (batch, 1) would be compared with every output of the batch
            raise _unlike(labels, f"numbers ({images},)")
        if labels.device.type == "cpu" and labels.is_floating_point() and not labels.isfinite().all():
            raise DataError("a batch has a label that is no finite number; leave out images without one")
        return labels

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of the standardised numbers; `labels` (batch,) are in their own unit."""
        mean, deviation = self.mean_and_deviation
        function = F.mse_loss if self.loss_name == "mse" else F.l1_loss
        return function(logits.squeeze(-1), ((labels - mean) / deviation).to(logits.dtype))

    def measured_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss itself."""
        return self.loss(logits, labels)

    def metrics(self, split: str) -> dict[str, Metric]:
        """Mean absolute error, in the unit of the labels."""
        return {"mae": MeanAbsoluteError()}

    def measure(self, metric: Metric, logits: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        metric.update(self.answers(logits), labels)

    def answers(self, logits: Tensor) -> Tensor:
        """The numbers (batch,), in the unit of the labels."""
        mean, deviation = self.mean_and_deviation
        return logits.squeeze(-1) * deviation + mean

    def describe(self) -> dict:
        """Labels, loss, and the mean and the standard deviation that undo the standardisation."""
        scale = {} if self.scale is None else dict(zip(("mean", "deviation"), self.scale, strict=True))
        return super().describe() | scale

    def state(self) -> dict:
        """Mean and deviation."""
        return {} if self.scale is None else {"scale": list(self.scale)}

    def load_state(self, state: dict) -> None:
        """Take mean and deviation of a checkpoint.

        Raises:
            StorageError: it has none.
        """
        if "scale" not in state:
            raise StorageError("the checkpoint is not one of a task that learns numbers")
        self.scale = tuple(state["scale"])

    def load_description(self, description: dict) -> None:
        """Take mean and deviation of an adapter."""
        self.scale = description["mean"], description["deviation"]


def _fits(labels: object, shape: tuple[int, ...]) -> bool:
    return isinstance(labels, Tensor) and tuple(labels.shape) == shape


def _unlike(labels: object, needed: str) -> DataError:
    found = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
    return DataError(f"labels of a batch must be {needed}, and these are {found}; let the loader give them so")


def build_objective(
    labels: Labels,
    num_classes: int,
    *,
    loss: Loss | None = None,
    label_smoothing: float = 0.0,
    class_weights: Weights = None,
    positive_weights: Weights = None,
    asymmetry: Asymmetry | None = None,
) -> Objective:
    """What is to be learnt of labels of a kind.

    Args:
        labels: "classes", "several" or "number".
        num_classes: how many classes or labels there are.
        loss: the first of `LOSSES` for these labels by default.
        label_smoothing: of classes.
        class_weights: of classes.
        positive_weights: of several labels.
        asymmetry: of the asymmetric loss; by default that of its paper.

    Raises:
        ConfigurationError: an option of other labels; or masks or objects, which are of other tasks.
    """
    if labels == "masks":
        raise ConfigurationError(
            "masks say the class of each pixel, which an image's one output does not; use SemanticSegmentation "
            "(--model SemanticSegmentation)"
        )
    if labels == "objects":
        raise ConfigurationError(
            "objects have places in an image, which an image's one output does not say; use ObjectDetection (--model "
            "ObjectDetection)"
        )
    allowed = LOSSES[labels]
    loss = allowed[0] if loss is None else loss
    if loss not in allowed:
        raise ConfigurationError(f"loss {loss} is not one of labels {labels!r}: use {' or '.join(allowed)}")
    belongs = {
        "label_smoothing": (bool(label_smoothing), labels == "classes", "labels 'classes'"),
        "class_weights": (class_weights is not None, labels == "classes", "labels 'classes'"),
        "positive_weights": (positive_weights is not None, labels == "several", "labels 'several'"),
        "asymmetry": (asymmetry is not None, loss == "asymmetric", "loss asymmetric"),
    }
    for name, (given, fits, where) in belongs.items():
        if given and not fits:
            raise ConfigurationError(f"{name} belongs to {where}, and this task has labels {labels!r} and loss {loss}")
    if labels == "classes":
        return OneClass(num_classes, label_smoothing, class_weights)
    if labels == "several":
        return SeveralLabels(num_classes, loss, asymmetry or Asymmetry(), positive_weights)
    return Number(loss)
