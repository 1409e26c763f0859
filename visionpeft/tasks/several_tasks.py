"""What is learnt of images of several tasks, each with classes of its own."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from visionpeft.errors import ConfigurationError
from visionpeft.methods import Method
from visionpeft.methods.parts.by_task import ByTask
from visionpeft.tasks.objective import Shown
from visionpeft.tasks.objectives import OneClass


class TaskAccuracy(Metric):
    """Top-1 accuracy of each of some tasks, (), the mean over those of which there were images.

    Args:
        first: the first class of each task.
        count: number of classes of each.
    """

    full_state_update = False

    def __init__(self, first: list[int], count: list[int]):
        super().__init__()
        self.ranges = list(zip(first, count, strict=True))
        # whole numbers stay exact where the task is put into half precision
        self.add_state("hits", torch.zeros(len(first), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(len(first), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch: logits (batch, classes) among the classes of each image's task, labels (batch,)."""
        right = logits.argmax(dim=-1) == labels
        for index, (first, count) in enumerate(self.ranges):
            own = (labels >= first) & (labels < first + count)
            self.hits[index] += (right & own).sum()
            self.images[index] += own.sum()

    def compute(self) -> Tensor:
        """The mean; not a number if there were no images."""
        seen = self.images > 0
        return (self.hits[seen].float() / self.images[seen]).mean()


class OneClassOfTask(OneClass):
    """One class of those of an image's task: cross-entropy among these. The label of an image says which task it is.

    The classes of all tasks stand one after another, as in one head that is a head for each task.
    `mean_top1`, by which the best epoch is chosen, is the mean of the accuracies of the tasks.

    Args:
        tasks: number of classes of each task, in the order of the labels.
        label_smoothing: probability mass spread evenly over the classes of the task.
    """

    monitor = "mean_top1"
    takes_probabilities = False
    shown = Shown("mean_top1", "mean top-1", "mean top-1 accuracy of the tasks", percentage=True)

    def __init__(self, tasks: Mapping[str, int], label_smoothing: float = 0.0):
        super().__init__(sum(tasks.values()), label_smoothing)
        self.tasks = dict(tasks)
        counts = torch.tensor(list(tasks.values()))
        self.task_of_class = torch.arange(len(counts)).repeat_interleave(counts)

    def tasks_of(self, labels: Tensor) -> Tensor:
        """Index of the task of each image, (batch,), from labels (batch,)."""
        return self.task_of_class.to(labels.device)[labels]

    def among_own(self, logits: Tensor, tasks: Tensor) -> Tensor:
        """Logits (batch, classes) with -inf for classes that are not of an image's task, (batch,) or () for all."""
        own = self.task_of_class.to(logits.device) == tasks.to(logits.device)[..., None]
        return logits.masked_fill(~own, float("-inf"))

    def judged(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits among the classes of each image's task."""
        return self.among_own(logits, self.tasks_of(labels))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, its smoothing spread over the classes of the task."""
        own = self.judged(logits, labels)
        loss = F.cross_entropy(own, labels)
        if not self.label_smoothing:
            return loss
        chances = own.log_softmax(dim=-1)
        present = chances.isfinite()
        mean = chances.masked_fill(~present, 0.0).sum(dim=-1) / present.sum(dim=-1)
        return (1 - self.label_smoothing) * loss - self.label_smoothing * mean.mean()

    def measured_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy among the classes of the task."""
        return F.cross_entropy(self.judged(logits, labels), labels)

    def metrics(self, split: str) -> dict[str, Metric]:
        """Top-1 accuracy of all images, of each task, and the mean of those of the tasks."""
        counts = list(self.tasks.values())
        firsts = [0, *accumulate(counts)][:-1]
        each = {
            f"{task}/top1": TaskAccuracy([first], [count])
            for (task, count), first in zip(self.tasks.items(), firsts, strict=True)
        }
        return {"top1": super().metrics(split)["top1"], "mean_top1": TaskAccuracy(firsts, counts), **each}

    def measure(self, metric: Metric, logits: Tensor, labels: Tensor) -> None:
        """Add a batch, judged among the classes of each image's task."""
        metric.update(self.judged(logits, labels), labels)

    def describe(self) -> dict:
        """As for one task, and the number of classes of each."""
        return super().describe() | {"tasks": self.tasks}


def check_one_task(
    options: Mapping[str, object], methods: Sequence[Method], recompute: str | None, compiled: bool
) -> None:
    """Refuse what does not know of several tasks.

    Args:
        options: by name, those that are for one task.
        methods: what is trained.
        recompute: what is computed again in the backward pass.
        compiled: whether the model is one graph.

    Raises:
        ConfigurationError: one is given.
    """
    for name, value in options.items():
        if value:
            raise ConfigurationError(f"{name} does not know of several tasks; leave it out, or train on one of them")
    for method in methods:
        name = type(method).__name__
        if method.compares_passes:
            raise ConfigurationError(
                f"{name} compares the class probabilities of two passes, which images of several tasks do not share; "
                "set its consistency to 0"
            )
        if isinstance(method, ByTask) and (recompute or compiled):
            option, why = (
                ("compile", "one graph is for one of them")
                if compiled
                else ("recompute", "the backward pass does not know it")
            )
            raise ConfigurationError(f"{name} acts by the task of an image, and {why}; leave {option} out")
