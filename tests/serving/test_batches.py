"""The thread that computes batches lives on, whatever happens to the requests."""

import threading
import time
from concurrent.futures import Future

import pytest
import torch

from visionpeft.serving.batches import Batches, Job
from visionpeft.serving.refusals import Refusal


class Alike:
    """A lane whose answers are zeros, after a gate is open.

    Args:
        answers: how many of them a batch gets beyond its jobs.
    """

    def __init__(self, answers: int = 0):
        self.answers = answers
        self.gate, self.begun = threading.Event(), threading.Event()

    def compute(self, jobs):
        self.begun.set()
        assert self.gate.wait(30)
        return [torch.zeros(1)] * (len(jobs) + self.answers)


class CancelledInBetween(Future):
    """Somebody cancels it whenever the thread of the batches has looked, or is about to settle it."""

    def cancelled(self):
        known = super().cancelled()
        self.cancel()
        return known

    def set_running_or_notify_cancel(self):
        self.cancel()
        return super().set_running_or_notify_cancel()


def job(lane, seconds=30.0, future=None) -> Job:
    return Job(lane, "a", torch.zeros(1), None, time.monotonic() + seconds, future or Future())


@pytest.fixture
def batches():
    made = Batches(1, 0.0, 10)
    yield made
    made.close()


@pytest.mark.parametrize("kind", [Future, CancelledInBetween])
@pytest.mark.parametrize("seconds", [0.0, 30.0])
def test_a_request_that_is_given_up_while_it_is_dropped_ends_nothing(batches, kind, seconds):
    lane = Alike()
    first = batches.submit(job(lane))
    assert lane.begun.wait(30)  # what comes now waits
    given_up, last = batches.submit(job(lane, seconds, kind())), batches.submit(job(lane))
    time.sleep(0.01)
    lane.gate.set()
    assert torch.equal(first.result(30), torch.zeros(1))
    assert torch.equal(last.result(30), torch.zeros(1))
    assert batches.alive()
    if kind is CancelledInBetween:
        assert given_up.cancelled()
    elif seconds == 0:
        with pytest.raises(Refusal, match="not ready in time"):
            given_up.result(30)
    else:
        assert torch.equal(given_up.result(30), torch.zeros(1))


def test_what_is_wrong_with_a_batch_ends_that_batch_alone():
    seen = []

    def count(jobs, seconds):
        seen.append(jobs)
        if len(seen) == 1:
            raise RuntimeError("the disk of the metrics is full")

    batches, lane, more = Batches(1, 0.0, 10, count), Alike(), Alike(answers=1)
    lane.gate.set()
    more.gate.set()
    batches.submit(job(lane))  # whose answer is lost
    with pytest.raises(ValueError, match="zip"):
        batches.submit(job(more)).result(30)
    assert torch.equal(batches.submit(job(lane)).result(30), torch.zeros(1))
    assert seen == [1, 1, 1]
    batches.close()
    assert not batches.alive()
