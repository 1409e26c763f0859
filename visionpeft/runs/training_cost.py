"""What training costs: time and peak memory, summed over the parts of a run that was resumed."""

import gc
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch


class TrainingCost(pl.Callback):
    """Measure the wall time of training and its peak memory, with validation and without the test.

    What the process needed before, such as for an earlier training of a protocol, does not count as far as the system
    can forget it: always on a GPU, and on Linux.
    """

    def __init__(self):
        self.earlier_seconds = 0.0
        self.peak_memory = 0
        self.memory_kind = "process memory"
        self.started: float | None = None
        self.device: torch.device | None = None  # while training

    @property
    def state_key(self) -> str:
        """Under which a checkpoint keeps its state; that of version 0.1.0."""
        return "Cost"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget earlier peaks, also where no gradient step follows."""
        self.device = pl_module.device
        gc.collect()  # an earlier model, which would count until its cycles are found
        if pl_module.device.type == "cuda":
            self.memory_kind = "GPU memory"
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        elif not forget_peak():
            self.memory_kind = "process memory since it began"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.started = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self.earlier_seconds, self.started = self.seconds, None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the peak, before a test adds its own."""
        self._look()
        self.device = None

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self.earlier_seconds + (0.0 if self.started is None else time.monotonic() - self.started)

    def _look(self) -> None:
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else peak_resident()
        self.peak_memory = max(self.peak_memory, peak)

    def state_dict(self) -> dict:
        """What a checkpoint keeps: also of a training that will be killed."""
        if self.device is not None:
            self._look()
        return {"seconds": self.seconds, "peak_memory": self.peak_memory}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue from a checkpoint."""
        self.earlier_seconds, self.peak_memory = state_dict["seconds"], state_dict["peak_memory"]


def forget_peak() -> bool:
    """Let the peak of resident memory begin anew from what is resident now; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed
        return False
    return True


def peak_resident() -> int:
    """Peak bytes of this process that were resident since it began, or since `forget_peak`."""
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in kilobytes on Linux
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
