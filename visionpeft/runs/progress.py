"""The progress of training: a bar in a terminal, a line now and then in a log."""

import math
import time
from collections.abc import Sequence

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from visionpeft.tasks.objective import Shown
from visionpeft.tasks.steps import planned_steps


class TrainingProgress(pl.Callback):
    """One bar over all training steps, and one over the test batches.

    Where the output is no terminal, a line is printed for about every tenth of the epochs instead.
    """

    def __init__(self):
        self.console = Console()
        self.bar: Progress | None = None
        self.task = None
        self.numbers = ""  # of the last finished epoch
        self.validated = False  # in this epoch; Lightning keeps the numbers of the last validation
        self.started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        self.started = time.monotonic()
        self._open("training", total=planned_steps(trainer).total, completed=trainer.global_step)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the numbers of the epoch."""
        self.validated = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that the epoch has validation numbers of its own."""
        self.validated = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args) -> None:
        """Advance by a step."""
        self._advance(trainer.global_step, f"{self._epoch(trainer)}  {self.numbers}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the epoch's numbers."""
        splits = ("train", "val") if self.validated else ("train",)
        self.numbers = _numbers(trainer.callback_metrics, pl_module.objective.shown, splits)
        text = f"{self._epoch(trainer)}  {self.numbers}"
        self._advance(trainer.global_step, text)
        every = max(1, trainer.max_epochs // 10)
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if not self.console.is_terminal and (trainer.current_epoch % every == every - 1 or last):
            self.console.print(f"{text}  {time.monotonic() - self.started:.0f} s", highlight=False, soft_wrap=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar of the test."""
        total = sum(trainer.num_test_batches)
        self._open("testing", total=total if math.isfinite(total) else None, completed=0)  # of a stream it is not known

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        """Advance by a batch."""
        self._advance(batch_idx + 1, "")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar before an error is shown."""
        self._close()

    @staticmethod
    def _epoch(trainer: pl.Trainer) -> str:
        return f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"

    def _open(self, title: str, total: int | None, completed: int) -> None:
        if not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn(title),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.bar.add_task("", total=total, completed=completed)
        self.bar.start()

    def _advance(self, completed: int, description: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=completed, description=description)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _numbers(metrics: dict, shown: Shown, splits: Sequence[str]) -> str:
    def metric(value: float) -> str:
        return f"{100 * value:.1f} %" if shown.percentage else f"{value:.4g}"

    def of(split: str) -> str:
        name = f"{split}/{shown.name}"  # some metrics are of a whole split, and none of the training
        return f"{split} {metrics[f'{split}/loss']:.3f}" + (f", {metric(metrics[name])}" if name in metrics else "")

    return f"loss and {shown.short}: " + "; ".join(of(split) for split in splits if f"{split}/loss" in metrics)
