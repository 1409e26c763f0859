"""Cells that are run in order within a time, each written down at once, so that the next run goes on where it ended."""

import gc
import json
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import peft
import timm
import torch
from torch import Tensor

DONE, FAILED = "done", "failed"


@dataclass(frozen=True)
class Setting:
    """Where and how large cells are run.

    Args:
        device: "cuda" or "cpu".
        tiny: sizes that take a CPU seconds, to see that everything runs.
        rounds: how often a step is timed after it was warmed up.
    """

    device: str
    tiny: bool = False
    rounds: int = 10

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU, which is waited for and has memory of its own."""
        return self.device.startswith("cuda")

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.on_gpu:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Args:
        name: by which it is found again.
        part: which table it belongs to.
        measure: gives the entries of its row, and raises where something is wrong; `Wrong` where it was measured.
    """

    name: str
    part: str
    measure: Callable[[Setting], dict]


class Wrong(Exception):
    """What was measured is not as it should be.

    Args:
        why: in one sentence.
        row: what was measured.
    """

    def __init__(self, why: str, row: dict):
        super().__init__(why)
        self.row = row


class TimeIsOver(BaseException):  # which nobody takes for a failure of what was interrupted
    """The run may take no more time; the cell in it is measured in the next run."""


@dataclass
class Journal:
    """The JSON file with what was measured.

    Args:
        path: the file; what it has already is taken over.
        machine: what the numbers depend on. Those of another machine are not mixed with these.

    Raises:
        SystemExit: the file is of another machine.
    """

    path: Path
    machine: dict
    cells: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self):
        if self.path.is_file():
            kept = json.loads(self.path.read_text())
            if kept["machine"] != self.machine:
                differing = ", ".join(
                    f"{key} {kept['machine'].get(key)!r} instead of {value!r}"
                    for key, value in self.machine.items()
                    if kept["machine"].get(key) != value
                )
                raise SystemExit(f"{self.path} is of another machine: {differing}; give another --output")
            self.cells = kept["cells"]

    def done(self, name: str) -> bool:
        """Whether a cell was measured, and was right."""
        return self.cells.get(name, {}).get("status") == DONE

    def failed(self) -> list[str]:
        """Names of the cells that failed."""
        return [name for name, cell in self.cells.items() if cell["status"] == FAILED]

    def note(self, cell: Cell, status: str, seconds: float, row: dict, error: str | None = None) -> None:
        """Write down a cell, whole or not at all."""
        self.cells[cell.name] = {"part": cell.part, "status": status, "seconds": round(seconds, 2), "row": row}
        if error is not None:
            self.cells[cell.name]["error"] = error
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"machine": self.machine, "cells": self.cells}, indent=1) + "\n")
        os.replace(partial, self.path)


def run(cells: Sequence[Cell], journal: Journal, setting: Setting, seconds: float) -> list[str]:
    """Run what the journal has not as done, in order, those that had failed last; returns what time was not left for.

    A cell that fails is written down with its error, and the next one is run.
    """
    end = time.monotonic() + seconds
    wanted = [cell for cell in cells if not journal.done(cell.name)]
    wanted.sort(key=lambda cell: cell.name in journal.failed())
    for index, cell in enumerate(wanted):
        left = end - time.monotonic()
        if left <= 0:
            return [each.name for each in wanted[index:]]
        before = time.monotonic()
        try:
            with at_most(left):
                row = cell.measure(setting)
        except TimeIsOver:
            return [each.name for each in wanted[index:]]
        except Wrong as wrong:
            journal.note(cell, FAILED, time.monotonic() - before, wrong.row, str(wrong))
        except Exception as error:  # whatever it is: it is written down, and the other cells are run
            journal.note(cell, FAILED, time.monotonic() - before, {}, said(error))
        else:
            journal.note(cell, DONE, time.monotonic() - before, row)
        status = journal.cells[cell.name]
        print(f"{status['seconds']:6.1f} s  {status['status']}  {cell.name}  {status.get('error', '')}", flush=True)
        _empty(setting)
    return []


def said(error: Exception) -> str:
    """The kind and first line of an error, and the last line of this project that it passed."""
    lines = str(error).strip().splitlines() or [""]
    frames = traceback.extract_tb(error.__traceback__)
    passed = [frame for frame in frames if "/visionpeft/" in frame.filename or "/gpu_cells/" in frame.filename]
    passed = [frame for frame in passed if frame.filename != __file__]
    where = f" ({passed[-1].filename.rpartition('/')[2]}:{passed[-1].lineno})" if passed else ""
    return f"{type(error).__name__}: {lines[0][:300]}{where}"


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Within the context the time is limited.

    Raises:
        TimeIsOver: it has passed.
    """

    def over(*_):
        raise TimeIsOver

    if not hasattr(signal, "SIGALRM"):  # Windows: a cell is not interrupted there
        yield
        return
    before = signal.signal(signal.SIGALRM, over)
    others = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *others)


def _empty(setting: Setting) -> None:
    """Give back the memory of the last cell, so that the next one's peak is its own."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if setting.on_gpu:
        torch.cuda.empty_cache()


def machine(setting: Setting) -> dict:
    """What the numbers depend on."""
    return {
        "device": torch.cuda.get_device_name() if setting.on_gpu else f"CPU, {platform.machine()}",
        "tiny": setting.tiny,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if setting.on_gpu else None,
        "timm": timm.__version__,
        "peft": peft.__version__,
    }


def distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float64 on the host."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return ((found - expected).norm() / expected.norm()).item()
