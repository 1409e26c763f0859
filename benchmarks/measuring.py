"""What the benchmarks share: clocks, saved bytes, tables and where they stand."""

import csv
import time
from pathlib import Path

import torch

from visionpeft.costs.saved_bytes import saved_bytes, storages

__all__ = ["clock", "filled", "kept_rows", "saved_bytes", "storages", "table", "write"]


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


def kept_rows(path: Path, **values: str) -> list[dict]:
    """The rows of a CSV file that have these values; none without the file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if values.items() <= row.items()]


def filled(text: str, name: str, content: str) -> str:
    """A page with what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` replaced.

    Raises:
        SystemExit: it has no such marks.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, has_begin, rest = text.partition(begin)
    _, has_end, after = rest.partition(end)
    if not has_begin or not has_end:
        raise SystemExit(f"the page has no {begin} and {end} to write between")
    return f"{before}{begin}\n{content}\n{end}{after}"
