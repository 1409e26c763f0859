"""What was trained on several tasks together, used for one of them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from visionpeft.errors import ConfigurationError, StorageError, did_you_mean
from visionpeft.sites.tasks_of_rows import of_tasks


class OneTask(nn.Module):
    """A model of several tasks that takes every image for one of the same task, and gives the logits of its classes.

    Args:
        model: images (batch, 3, height, width) -> logits (batch, classes of all tasks).
        task: name of the task.
        first: the first of its classes.
        count: how many it has.
    """

    def __init__(self, model: nn.Module, task: str, first: int, count: int):
        super().__init__()
        self.model = model
        self.task = task
        self.first = first
        self.count = count

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes of the task)."""
        with of_tasks(self.task):
            return self.model(images)[:, self.first : self.first + self.count]


def learnt_tasks(objective: Mapping, names: list[str] | None, folder: Path | str) -> dict[str, int] | None:
    """The number of classes of each task that an adapter has learnt, None where there are not several.

    Raises:
        StorageError: they are not those of its classes.
    """
    tasks = objective.get("tasks")
    if tasks is None:
        return None
    counts = tasks.values() if isinstance(tasks, Mapping) else ()
    whole = all(isinstance(count, int) and count > 0 for count in counts) and len(counts) > 0
    if not whole or sum(counts) != len(names or ()):
        raise StorageError(f"{folder} has learnt several tasks, but their classes are not those that it names")
    return dict(tasks)


def one_task(
    model: nn.Module, names: list[str] | None, objective: Mapping, task: str | None, folder: Path | str
) -> tuple[nn.Module, list[str] | None]:
    """A model and the names of its classes, for one task where it has learnt several.

    Args:
        model: the model with what was trained.
        names: of all its classes.
        objective: what it has learnt, as its description says.
        task: of the images; None for what has learnt one task.
        folder: where it is saved, for an error.

    Raises:
        ConfigurationError: it has learnt several tasks and none of them is named, or one that it has not learnt.
        StorageError: the description does not agree with itself.
    """
    tasks = learnt_tasks(objective, names, folder)
    if tasks is None:
        if task is not None:
            raise ConfigurationError(f"{folder} was not trained on several tasks; leave the task {task!r} out")
        return model, names
    if task is None:
        raise ConfigurationError(
            f"{folder} was trained on several tasks, {', '.join(tasks)}; name that of the images (--task, or task= in "
            "Python)"
        )
    if task not in tasks:
        raise ConfigurationError(f"{folder} was not trained on a task {task!r}{did_you_mean(task, tasks)}")
    first = sum(list(tasks.values())[: list(tasks).index(task)])
    own = [name.removeprefix(f"{task}/") for name in names[first : first + tasks[task]]]
    return OneTask(model, task, first, tasks[task]), own


def treatment(data: Mapping, task: str, folder: Path | str) -> tuple[Mapping, dict[str, tuple[float, ...]]]:
    """What a description says of the data of one task, and the mean and std of its images.

    Raises:
        StorageError: it does not say that.
    """
    tasks = data.get("tasks")
    found = tasks.get(task) if isinstance(tasks, Mapping) else None
    used = found.get("normalisation") if isinstance(found, Mapping) else None
    if not isinstance(used, Mapping) or not all(isinstance(used.get(key), list) for key in ("mean", "std")):
        raise StorageError(f"{folder} does not say how the images of task {task!r} were treated")
    return found, {key: tuple(used[key]) for key in ("mean", "std")}
