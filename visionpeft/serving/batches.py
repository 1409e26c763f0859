"""Requests of many clients, computed together by one thread: whatever is like the oldest one, as many as fit."""

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Protocol

import torch

from visionpeft.serving.refusals import LOG, Refusal


class Lane(Hashable, Protocol):
    """What computes jobs; those of equal lanes share a batch."""

    def compute(self, jobs: Sequence["Job"]) -> list[torch.Tensor | Exception]:
        """The answer of each job, or why it has none."""


@dataclass(eq=False)
class Job:
    """A prediction to be made.

    Args:
        lane: what computes it.
        name: of the adapter.
        image: uint8 (3, height, width), prepared.
        about: what the lane knows of the adapter.
        deadline: by the monotonic clock.
        future: gets the answer.
        arrived: when it was submitted.
    """

    lane: Lane
    name: str
    image: torch.Tensor
    about: object
    deadline: float
    future: Future = field(default_factory=Future)
    arrived: float = 0.0


class Batches:
    """A queue of jobs and the one thread that computes them, the only one that uses the models.

    Args:
        most: jobs in a batch.
        wait: seconds for which the oldest job waits for others, while the batch is not full.
        queue: most jobs that wait.
        seen: called with the number of jobs of each batch and the seconds it took.
    """

    def __init__(self, most: int, wait: float, queue: int, seen: Callable[[int, float], None] = lambda *_: None):
        self.most, self.wait, self.queue, self.seen = most, wait, queue, seen
        self._waiting: deque[Job] = deque()
        self._calls: deque[tuple[Callable, Future]] = deque()
        self._changed = Condition()
        self._closing = False
        self._busy_since: float | None = None
        self._thread = Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Future:
        """Take a job.

        Raises:
            Refusal: 429 if too many wait, 503 after `close`.
        """
        with self._changed:
            self._refuse_if_closing()
            if len(self._waiting) >= self.queue:
                raise Refusal(429, f"{self.queue} requests wait already; ask again later")
            job.arrived = time.monotonic()
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def call(self, function: Callable) -> Future:
        """Call a function in the thread of the models, before the next batch."""
        future: Future = Future()
        with self._changed:
            self._refuse_if_closing()
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Compute what waits, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    def alive(self) -> bool:
        """Whether the thread runs, without which nothing is computed."""
        return self._thread.is_alive()

    def busy_for(self) -> float:
        """Seconds since the thread began what it does; 0 if it does nothing."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def _refuse_if_closing(self) -> None:
        if self._closing:
            raise Refusal(503, "the service is being stopped")

    def _run(self) -> None:
        while (work := self._next()) is not None:
            self._busy_since = time.monotonic()
            try:
                work()
            except Exception:  # whatever it is, the thread goes on
                LOG.exception("a batch failed")
            self._busy_since = None

    def _next(self) -> Callable[[], None] | None:
        """What is to be done next, or None when all is done and no more will come."""
        with self._changed:
            while True:
                if self._calls:
                    function, future = self._calls.popleft()
                    return lambda: _settle(future, function)
                self._drop_late()
                if not self._waiting:
                    if self._closing:
                        return None
                    self._changed.wait()
                    continue
                lane = self._waiting[0].lane
                alike = [job for job in self._waiting if job.lane == lane][: self.most]
                left = self._waiting[0].arrived + self.wait - time.monotonic()
                if len(alike) < self.most and left > 0 and not self._closing:
                    self._changed.wait(left)
                    continue
                taken = set(map(id, alike))
                self._waiting = deque(job for job in self._waiting if id(job) not in taken)
                return lambda: self._compute(lane, alike)

    def _drop_late(self) -> None:
        """Leave out jobs that nobody waits for any more."""
        now = time.monotonic()
        for job in [job for job in self._waiting if job.deadline < now or job.future.cancelled()]:
            self._waiting.remove(job)
            if job.future.set_running_or_notify_cancel():  # from now on nobody can cancel it
                job.future.set_exception(Refusal(504, "the prediction was not ready in time"))

    def _compute(self, lane: Lane, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
        if not jobs:
            return
        began = time.monotonic()
        try:
            answers = list(zip(jobs, lane.compute(jobs), strict=True))
        except Exception as error:  # every job gets an answer
            answers = [(job, error) for job in jobs]
        self.seen(len(jobs), time.monotonic() - began)
        for job, result in answers:
            if isinstance(result, Exception):
                job.future.set_exception(result)
            else:
                job.future.set_result(result)


def _settle(future: Future, function: Callable) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
