"""Figures of a run: learning curves, confusion matrix, reliability diagram, wrong predictions, predicted numbers."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from visionpeft.runs.calibration import Calibration
from visionpeft.runs.mistake import Mistake
from visionpeft.tasks.objective import Shown


def draw_curves(history: list[dict[str, float]], shown: Shown, path: Path) -> None:
    """Loss, the metric shown for each epoch, and learning rate over epochs."""
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    loss, metric, rate = figure.subplots(1, 3)
    epochs = [row["epoch"] + 1 for row in history]
    for split in ("train", "val"):
        for axes, name, scale in ((loss, "loss", 1), (metric, shown.name, 100 if shown.percentage else 1)):
            values = [row.get(f"{split}/{name}") for row in history]
            if any(value is not None for value in values):
                values = [float("nan") if value is None else scale * value for value in values]
                axes.plot(epochs, values, label=split, marker="." if len(epochs) < 30 else None)
    rate.plot(epochs, [row["lr"] for row in history], color="tab:gray")
    title_of_metric = f"{shown.title} (%)" if shown.percentage else shown.title
    for axes, title in ((loss, "loss"), (metric, title_of_metric), (rate, "learning rate")):
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
    if loss.has_data():
        loss.legend()
    figure.savefig(path, dpi=110)


def draw_confusion(confusion: torch.Tensor, class_names: list[str], path: Path) -> None:
    """Share of each true class (rows) that was predicted as each class (columns)."""
    shares = (confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    size = min(14, 4 + 0.22 * len(class_names))
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axes.set(xlabel="predicted", ylabel="true", title="share of the true class")
    if len(class_names) <= 60:
        axes.set_xticks(range(len(class_names)), class_names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(class_names)), class_names, fontsize=7)
    figure.colorbar(image, shrink=0.7)
    figure.savefig(path, dpi=110)


def draw_reliability(calibration: Calibration, path: Path) -> None:
    """What came true of the probabilities in each bin, against their mean; below, how many there are."""
    figure = Figure(figsize=(4.5, 5.5), layout="constrained")
    reliability, numbers = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    middles = (torch.arange(calibration.bins) + 0.5) / calibration.bins
    filled = calibration.counts > 0
    counts = calibration.counts[filled]
    came_true, mean = calibration.hits[filled] / counts, calibration.confidences[filled] / counts
    reliability.bar(
        middles[filled].numpy(), came_true.numpy(), width=1 / calibration.bins, edgecolor="white", label="came true"
    )
    reliability.plot(mean.numpy(), came_true.numpy(), "o", color="black", markersize=3, label="at the mean of the bin")
    reliability.plot([0, 1], [0, 1], "--", color="tab:gray", label="calibrated")
    reliability.set(
        xlim=(0, 1), ylim=(0, 1), ylabel="share", title=f"expected calibration error {calibration.error:.3f}"
    )
    reliability.legend(fontsize=8, loc="upper left")
    numbers.bar(
        middles.numpy(), calibration.counts.numpy(), width=1 / calibration.bins, edgecolor="white", color="tab:gray"
    )
    numbers.set(xlabel="probability", ylabel="number")
    figure.savefig(path, dpi=110)


def draw_numbers(true: torch.Tensor, predicted: torch.Tensor, path: Path) -> None:
    """Predicted against true numbers, each (n,)."""
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(true.numpy(), predicted.numpy(), ".", alpha=0.6)
    ends = [min(true.min(), predicted.min()).item(), max(true.max(), predicted.max()).item()]
    axes.plot(ends, ends, "--", color="tab:gray")
    axes.set(xlabel="true", ylabel="predicted", title="predicted numbers")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def draw_mistakes(mistakes: list[Mistake], class_names: list[str], path: Path, columns: int = 6) -> None:
    """The most confident mistakes first, each with its true and its predicted class."""
    rows = max(1, -(-len(mistakes) // columns))
    figure = Figure(figsize=(2 * columns, 2.5 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, mistake in zip(figure.axes, sorted(mistakes, reverse=True), strict=False):
        axes.imshow(mistake.image.permute(1, 2, 0).numpy())
        axes.set_title(
            f"{class_names[mistake.prediction]} {100 * mistake.confidence:.0f} %\nis {class_names[mistake.label]}",
            fontsize=8,
        )
    if not mistakes:
        figure.suptitle("no wrong predictions")
    figure.savefig(path, dpi=100)
