"""How often the host waits for the device in a training step: never, if nothing is copied or read.

PyTorch raises where the host would wait (`torch.cuda.set_sync_debug_mode("error")`). The first step may: what it
copies stays on the device. On a CPU there is nothing to wait for, and the steps are run without the count.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

import visionpeft as vp

from . import exactness
from .running import Cell, Setting, Wrong, said

# TPT, which is no training, asks whether the context it starts from is the one it has features of.
ALLOWED = {"TPT": 1}


def cells(setting: Setting) -> list[Cell]:
    """One for each method."""
    return [Cell(f"waiting: {name}", "waiting", partial(method, name)) for name in exactness.methods_listed(setting)]


def learner_cells(setting: Setting) -> list[Cell]:
    """One for each learner."""
    return [
        Cell(f"waiting: learner {name}", "waiting", partial(learner, name))
        for name in exactness.learners_listed(setting)
    ]


def method(name: str, setting: Setting) -> dict:
    """A step of a method: forward, penalty, backward, AdamW, and what the method does after a step."""
    model, images = exactness.adapted(name, setting)
    model, images = model.to(setting.device).train(), images.to(setting.device)
    targets = exactness.labels().to(setting.device)
    optimizer = torch.optim.AdamW(vp.trainable_parameters(model), lr=1e-4)

    def step() -> None:
        loss, _ = exactness.of_model(model, images, targets)
        (loss + vp.penalty(model)).backward()
        optimizer.step()
        vp.after_step(model, 1, 10)
        optimizer.zero_grad()

    return counted(name, step, setting)


def learner(name: str, setting: Setting) -> dict:
    """A step of a learner, or what it computes where nothing is trained."""
    made, images = exactness.made_learner(name)
    made, images = made.to(setting.device).train(), images.to(setting.device)
    targets = exactness.labels()[: len(images)].to(setting.device)
    trained = made.trainable_parameters()
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> None:
        loss, _ = exactness.of_learner(made, images, targets)
        if optimizer is not None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return counted(name, step, setting)


def counted(name: str, step: Callable[[], None], setting: Setting) -> dict:
    """How often the third step waits.

    Raises:
        Wrong: more often than it may, with the place that waits first.
    """
    for _ in range(2):
        step()
    setting.wait()
    if not setting.on_gpu:
        return {"what": name, "waits": "not counted on a CPU"}
    where = ""
    try:
        with watched("error"):
            step()
        waits = 0
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        where = said(error)
        with watched("warn") as seen:
            step()
        waits = sum("synchronizing" in str(each.message) for each in seen)
    row = {"what": name, "waits": waits}
    if waits > ALLOWED.get(name, 0):
        raise Wrong(f"the host waits {waits} times for the device in each step, first in {where}", row)
    return row


@contextmanager
def watched(mode: str) -> Iterator[list]:
    """Within the context PyTorch tells where the host waits; yields its warnings."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            yield seen
    finally:
        torch.cuda.set_sync_debug_mode("default")
