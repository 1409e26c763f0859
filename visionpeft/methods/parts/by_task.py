"""Methods that act on each image by the task it belongs to."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from visionpeft.methods.parts.base import Method, require
from visionpeft.sites.tasks_of_rows import check_task_names


@dataclass(frozen=True)
class ByTask(Method):
    """Base of methods that act on each image by its task, which `visionpeft.of_tasks` says.

    Args:
        tasks: names of the tasks; those of the data are filled in by `visionpeft.fit`. With none there is one task,
            which need not be said.
    """

    tasks: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        check_task_names(self.tasks)

    @property
    def number_of_tasks(self) -> int:
        """How many tasks there are."""
        return max(1, len(self.tasks))


def for_tasks(methods: Method | Sequence[Method], tasks: Sequence[str]) -> list[Method]:
    """Methods that know the tasks of the data.

    Raises:
        ConfigurationError: one was given other tasks.
    """
    found = []
    for method in methods if isinstance(methods, list | tuple) else [methods]:
        if isinstance(method, ByTask):
            same = not method.tasks or list(method.tasks) == list(tasks)
            require(same, method, f"tasks are {', '.join(method.tasks)}, but the data has {', '.join(tasks)}")
            method = dataclasses.replace(method, tasks=tuple(tasks))
        found.append(method)
    return found
