"""What the test split showed of masks: IoU of each class, and images with their masks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.data.segmentation.masks import IGNORED
from visionpeft.data.segmentation.overlays import overlay
from visionpeft.runs.test_record import Record, displayed

SHOWN = 8


class MasksRecord(Record):
    """Pixels by true and predicted class, and the first images of the test with their masks.

    Args:
        class_names: of the pixels.
        palette: a colour for each.
    """

    def __init__(self, class_names: list[str], palette: list[list[int]]):
        self.class_names = class_names
        self.palette = palette
        self.confusion = torch.zeros(len(class_names), len(class_names), dtype=torch.long)  # rows are true classes
        self.images = 0
        self.shown: list[tuple[Tensor, np.ndarray, np.ndarray]] = []  # image, true and predicted mask

    def add(self, answers: Tensor, batch: Sequence, preprocessing: Preprocessing) -> None:
        """Add the classes found in a batch, (batch, height, width)."""
        images, masks, found = batch[0], batch[1].cpu(), answers.cpu()
        counts = masks != IGNORED
        number = len(self.class_names)
        self.confusion += torch.bincount(masks[counts] * number + found[counts], minlength=number**2).view(number, -1)
        self.images += len(images)
        for row in range(min(len(images), SHOWN - len(self.shown))):
            image = displayed(images[row], preprocessing)
            self.shown.append((image, masks[row].numpy(), found[row].numpy()))

    def take(self, shares: Sequence["MasksRecord"]) -> None:
        """Put together the shares of several processes."""
        self.confusion = sum(share.confusion for share in shares)
        self.images = sum(share.images for share in shares)
        self.shown = [each for share in shares for each in share.shown][:SHOWN]

    @property
    def iou(self) -> list[float | None]:
        """TP / (TP + FP + FN) of each class; None of one that is neither labelled nor predicted."""
        hits = self.confusion.diagonal()
        union = self.confusion.sum(0) + self.confusion.sum(1) - hits
        return [hit / all_ if all_ else None for hit, all_ in zip(hits.tolist(), union.tolist(), strict=True)]

    def numbers(self) -> dict[str, float | None]:
        """Mean over the labelled classes of the share of pixels that was found; None if no pixel is labelled."""
        support = self.confusion.sum(1)
        present = support > 0
        recall = self.confusion.diagonal()[present] / support[present]
        return {"mean_accuracy": recall.mean().item() if present.any() else None}

    def about(self) -> dict:
        """Over which classes the mean is taken, and the IoU of each."""
        iou = self.iou
        return {
            "classes_tested": {
                "occurring": int((self.confusion.sum(1) > 0).sum()),
                "of": len(self.class_names),
                "averaged": sum(value is not None for value in iou),
                "miou": "over all pixels of the test together; mean over the classes that are labelled or predicted",
                "iou_by_class": dict(zip(self.class_names, iou, strict=True)),
            }
        }

    def draw(self, folder: Path, class_names: list[str]) -> None:
        """IoU of each class, and the first images with their true and predicted masks."""
        self._draw_iou(folder / "iou_by_class.png")
        self._draw_masks(folder / "masks.png")

    def _draw_iou(self, path: Path) -> None:
        names = [name for name, value in zip(self.class_names, self.iou, strict=True) if value is not None]
        values = [100 * value for value in self.iou if value is not None]
        figure = Figure(figsize=(6, 1 + 0.22 * len(names)), layout="constrained")
        axes = figure.subplots()
        axes.barh(range(len(names)), values)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel="IoU (%)")
        figure.savefig(path, dpi=110)

    def _draw_masks(self, path: Path) -> None:
        figure = Figure(figsize=(2 * max(1, len(self.shown)), 6.4), layout="constrained")
        columns = figure.subplots(3, max(1, len(self.shown)), squeeze=False).T
        for axes in figure.axes:
            axes.axis("off")
        for (image, *masks), (first, *others) in zip(self.shown, columns, strict=False):
            pixels = Image.fromarray((255 * image.permute(1, 2, 0).numpy()).astype(np.uint8))
            first.imshow(pixels)
            for mask, axes, title in zip(masks, others, ("true", "predicted"), strict=True):
                axes.imshow(overlay(pixels, mask, self.palette))
                axes.set_title(title, fontsize=8)
        figure.savefig(path, dpi=100)
