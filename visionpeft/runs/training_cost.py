"""What training costs: time and peak memory, summed over the parts of a run that was resumed."""

import resource
import sys
import time

import lightning.pytorch as pl
import torch


class Cost(pl.Callback):
    """Measure the wall time of training (with validation, without the test) and the peak memory."""

    def __init__(self):
        self.earlier_seconds = 0.0
        self.earlier_peak = 0
        self.started: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start measuring."""
        self.started = time.monotonic()
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self.earlier_seconds, self.started = self.seconds, None

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self.earlier_seconds + (0.0 if self.started is None else time.monotonic() - self.started)

    @property
    def peak_memory(self) -> int:
        """Peak bytes: allocated on the GPU, or else resident in this process."""
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            peak = torch.cuda.max_memory_allocated()
        else:
            unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in kilobytes on Linux
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return max(self.earlier_peak, peak)

    @property
    def memory_kind(self) -> str:
        """What `peak_memory` counts."""
        return "GPU memory" if torch.cuda.is_available() and torch.cuda.max_memory_allocated() else "process memory"

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return {"seconds": self.seconds, "peak_memory": self.peak_memory}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue from a checkpoint."""
        self.earlier_seconds, self.earlier_peak = state_dict["seconds"], state_dict["peak_memory"]
