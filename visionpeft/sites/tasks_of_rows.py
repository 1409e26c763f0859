"""Which task each image of a batch belongs to, as data of a call, for methods that act by it.

Like a route (`sites.routing`) it is known in a context of Python: in the thread, or the task of an event loop, that has
said it.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from visionpeft.errors import ConfigurationError, did_you_mean


@dataclass(frozen=True)
class TasksOfRows:
    """The tasks of a batch.

    Args:
        names: tasks.
        rows: for each image the index of its task in `names`, int64 (batch,); or () where all images have one task.
    """

    names: tuple[str, ...]
    rows: torch.Tensor


OPEN: ContextVar[TasksOfRows | None] = ContextVar("visionpeft_tasks", default=None)


@contextmanager
def tasks_of_rows(names: Sequence[str], rows: torch.Tensor) -> Iterator[None]:
    """Within the context the images of batches belong to these tasks; see `TasksOfRows`."""
    token = OPEN.set(TasksOfRows(tuple(names), rows))
    try:
        yield
    finally:
        OPEN.reset(token)


@contextmanager
def of_tasks(tasks: str | Sequence[str]) -> Iterator[None]:
    """Say to which task the images belong that a model is called with, for methods that act by it, such as `MOELoRA`.

        with visionpeft.of_tasks("clipart"):
            logits = model(images)

    It holds in this thread (and event-loop task) alone. Other methods take no notice of it. Within it, `merge` merges
    an adapter as it is for that task.

    Args:
        tasks: the name of the task of all images, or one name for each image of the batch.

    Raises:
        ConfigurationError: there is no name.
    """
    if isinstance(tasks, str):
        rows = torch.tensor(0)
        names = (tasks,)
    else:
        names = tuple(dict.fromkeys(tasks))
        if not names:
            raise ConfigurationError("of_tasks needs the name of a task, or one for each image of the batch")
        rows = torch.tensor([names.index(task) for task in tasks])
    with tasks_of_rows(names, rows):
        yield


def check_task_names(names: Sequence[str]) -> None:
    """Refuse names that are no names of tasks.

    Raises:
        ConfigurationError: a name is given twice, or has other characters than letters, digits, _ and -.
    """
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigurationError(f"the name of a task has letters, digits, _ and - alone, unlike {name!r}")
    if len(set(names)) < len(names):
        raise ConfigurationError(f"the tasks {', '.join(names)} have one name twice; give each its own")


def rows_of(tasks: Sequence[str], x: torch.Tensor, method: str) -> torch.Tensor:
    """For each row of x, the index of its task in `tasks`.

    Args:
        tasks: the tasks that a method knows.
        x: tokens (rows, ...), where an image has one row or equally many that follow each other, such as windows.
        method: its name, for an error.

    Returns:
        int64 (rows,), or () where all rows have one task.

    Raises:
        ConfigurationError: the method knows several tasks and that of an image is not known, or is none of them.
    """
    if len(tasks) <= 1:
        return torch.zeros((), dtype=torch.long, device=x.device)
    opened = OPEN.get()
    if opened is None:
        raise ConfigurationError(
            f"{method} acts by the task of an image ({', '.join(tasks)}), which is not known here; call the model "
            "within visionpeft.of_tasks(task)"
        )
    rows = opened.rows.to(x.device)
    if opened.names != tuple(tasks):
        for name in opened.names:
            if name not in tasks:
                raise ConfigurationError(f"{method} was not trained for a task {name!r}{did_you_mean(name, tasks)}")
        rows = torch.tensor([tasks.index(name) for name in opened.names], device=x.device)[rows]
    if rows.ndim == 0:
        return rows
    each, rest = divmod(len(x), len(rows))
    if rest or not each:
        raise ConfigurationError(f"tasks are named for {len(rows)} images, but the batch has {len(x)}")
    return rows.repeat_interleave(each)


def known_rows(tasks: Sequence[str], x: torch.Tensor, method: str) -> torch.Tensor | None:
    """As `rows_of`, int64 (rows,), for what can do without the task; None where it is not known, or in a graph.

    Raises:
        ConfigurationError: tasks are known, and are none of these.
    """
    if torch.compiler.is_compiling() or OPEN.get() is None:
        return None
    return rows_of(tasks, x, method).expand(len(x))


def one_task(tasks: Sequence[str], like: torch.Tensor, method: str) -> int:
    """The index of the task of all images, for what cannot depend on the image, such as a merged weight.

    Raises:
        ConfigurationError: it is not known, or there are several.
    """
    opened = OPEN.get()
    if len(tasks) > 1 and opened is not None and opened.rows.ndim:
        raise ConfigurationError(
            f"{method} is merged as it is for one task; merge within visionpeft.of_tasks(task) with one name"
        )
    return int(rows_of(tasks, like, method))
