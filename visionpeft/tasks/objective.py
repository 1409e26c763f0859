"""What the objectives of tasks have in common: loss, metrics, and what outputs mean."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from visionpeft.data.labels import Labels
from visionpeft.errors import ConfigurationError

Loss = Literal["cross_entropy", "bce", "asymmetric", "mse", "l1"]
Weights = Literal["balanced"] | list[float] | None


@dataclass(frozen=True)
class Shown:
    """The number that stands for an epoch in the terminal and in the curves.

    Args:
        name: of the metric.
        short: in the terminal.
        title: in curves.
        percentage: whether it is a share.
    """

    name: str
    short: str
    title: str
    percentage: bool


class Objective:
    """Base of what can be learnt of an image.

    Attributes:
        labels: what a label is, as data modules say it.
        outputs: outputs of the model.
        monitor: the metric of the validation split by which the best epoch is chosen.
        mode: "max" if the best epoch has the largest, "min" if the smallest.
        shown: the metric shown for each epoch.
        loss_name: as the option of the task.
        rounded: what of the labels half precision of everything would round, and how far; None if nothing.
    """

    labels: Labels
    outputs: int
    monitor: str
    mode: Literal["max", "min"] = "max"
    shown: Shown
    loss_name: Loss | Literal["sigmoid"]
    rounded: str | None = None

    def check_precision(self, precision: str | int | None) -> None:
        """Refuse half precision of everything where Lightning would round labels by it, as `rounded` says.

        Raises:
            ConfigurationError: such a precision.
        """
        if self.rounded is not None and str(precision) in ("16-true", "bf16-true"):
            raise ConfigurationError(
                f"precision {precision} rounds {self.rounded}; use {str(precision).removesuffix('-true')}-mixed, or "
                "32-true"
            )

    def learn(self, labels: Sequence, class_names: Sequence[str]) -> None:
        """Take from the training labels what the loss depends on.

        Raises:
            ConfigurationError: weights that cannot be computed from them.
        """

    def read(self, labels: Tensor, images: int) -> Tensor:
        """The labels of so many images, of whatever loader, as `loss` takes them.

        Raises:
            DataError: they are no such labels.
        """
        return labels

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of a training batch, of logits (batch, outputs) in float32."""

    def loss_weight(self, labels: Tensor) -> Tensor | None:
        """By what the sum over a batch is divided in `loss`, (); None if it is the number of samples."""
        return None

    @abstractmethod
    def measured_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss without weights and smoothing, as it is measured outside training."""

    @abstractmethod
    def metrics(self, split: str) -> dict[str, Metric]:
        """What is measured of a split beside the loss."""

    def measure(self, metric: Metric, logits: Tensor, labels: Tensor) -> None:
        """Add a batch to one of these metrics."""
        metric.update(logits, labels)

    def judged(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The outputs (batch, outputs) as they are measured beside labels: those that an image can have."""
        return logits

    @abstractmethod
    def answers(self, logits: Tensor) -> Tensor:
        """What the outputs say: probabilities (batch, classes), or numbers (batch,)."""

    def describe(self) -> dict:
        """For the record of a run, and for who uses what was trained."""
        return {"labels": self.labels, "loss": self.loss_name}

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {}

    def load_state(self, state: dict) -> None:
        """Take what `state` gave."""

    def load_description(self, description: dict) -> None:
        """Take what was learnt from labels from what `describe` gave for an adapter that is loaded."""


def unknown_class(labels: Tensor, classes: int, lowest: int = 0) -> int | None:
    """The first label that is no class, None if there is none.

    On a CPU alone: another device would be waited for, and the loss ends there with an error of its own.
    """
    if labels.device.type != "cpu" or lowest <= int(labels.min()) <= int(labels.max()) < classes:
        return None
    return int(labels[(labels < lowest) | (labels >= classes)][0])


def checked(weights: Weights, num_classes: int, name: str) -> Weights:
    """Weights as given.

    Raises:
        ConfigurationError: not as many as classes, or one that is not positive.
    """
    if weights is None or weights == "balanced":
        return weights
    if len(weights) != num_classes or not all(0 < weight < float("inf") for weight in weights):
        raise ConfigurationError(
            f"{name} must be balanced, or a list of {num_classes} positive numbers in the order of the class names, "
            f"not {weights}"
        )
    return list(weights)


def beside(logits: Tensor, given: Weights, weights: list[float] | None, name: str) -> Tensor | None:
    """Weights as a tensor beside the logits."""
    if given is None:
        return None
    if weights is None:
        raise ConfigurationError(f"{name} balanced is computed from training labels; train with a data module")
    return torch.tensor(weights, dtype=logits.dtype, device=logits.device)
