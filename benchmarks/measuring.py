"""What the benchmarks share: clocks, saved bytes, tables."""

import csv
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def storages(module: nn.Module) -> set[int]:
    """Where the parameters and buffers of a module lie."""
    return {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}


def saved_bytes(step: Callable[[], Tensor], frozen: set[int]) -> tuple[int, Tensor]:
    """Most bytes of distinct storages kept for backward during a step, without parameters."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = step()
    return sum(seen.values()), result


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
