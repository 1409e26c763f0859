"""metrics.csv: one row for each epoch, continued when a run resumes."""

import csv
import time
from pathlib import Path

import lightning.pytorch as pl

from visionpeft.files import replacing


def read_history(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics.csv, empty cells left out; no rows if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


class EpochHistory(pl.Callback):
    """Write epoch, step, learning rate at its end, seconds and the metrics at the end of each training epoch.

    Args:
        path: the CSV file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, float]] = []
        self.started = 0.0
        self.validated = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the rows of epochs that the resumed checkpoint has seen."""
        self.rows = [row for row in read_history(self.path) if row["epoch"] < trainer.current_epoch]
        self.started = time.monotonic()  # an epoch in whose middle a training goes on does not start

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of the epoch."""
        self.started = time.monotonic()
        self.validated = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that this epoch has validation numbers of its own; Lightning keeps showing the last ones."""
        self.validated = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the row of the epoch and write the file."""
        row = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": round(time.monotonic() - self.started, 3),
        }
        splits = ("train/", "val/") if self.validated else ("train/",)
        row |= {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(splits)}
        self.rows.append(row)
        if trainer.is_global_zero:
            names = list(dict.fromkeys(name for row in self.rows for name in row))
            with replacing(self.path) as partial, partial.open("w", newline="") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(self.rows)
