"""What the benchmarks share: clocks, saved bytes, tables."""

import csv
import time
from pathlib import Path

import torch

from visionpeft.costs.saved_bytes import saved_bytes, storages

__all__ = ["clock", "saved_bytes", "storages", "table", "write"]


def clock(device: str) -> float:
    """Seconds: of this process's CPU time, which other processes do not disturb, or of the clock on a GPU."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def table(rows: list[dict]) -> str:
    """Rows as Markdown."""
    head = list(rows[0])
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(str(value) for value in row.values())} |" for row in rows)])


def write(path: Path, rows: list[dict]) -> None:
    """Rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
