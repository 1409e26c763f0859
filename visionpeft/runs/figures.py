"""Figures of a run: learning curves, confusion matrix, wrong predictions."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from visionpeft.runs.test_record import Mistake


def draw_curves(history: list[dict[str, float]], path: Path) -> None:
    """Loss, accuracy and learning rate over epochs."""
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    epochs = [row["epoch"] + 1 for row in history]
    for split in ("train", "val"):
        for axes, name, scale in ((loss, "loss", 1), (accuracy, "top1", 100)):
            values = [row.get(f"{split}/{name}") for row in history]
            if any(value is not None for value in values):
                values = [float("nan") if value is None else scale * value for value in values]
                axes.plot(epochs, values, label=split, marker="." if len(epochs) < 30 else None)
    rate.plot(epochs, [row["lr"] for row in history], color="tab:gray")
    for axes, title in ((loss, "loss"), (accuracy, "top-1 accuracy (%)"), (rate, "learning rate")):
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
