"""What the test split showed of objects: average precision of each class, and images with what was found."""

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.data.detection.objects import Objects
from visionpeft.data.detection.overlays import drawn
from visionpeft.runs.test_record import Record, displayed

SHOWN = 6
SCORE = 0.3  # of what is drawn


class ObjectsRecord(Record):
    """Average precision by class, and the first images of the test with their objects.

    Args:
        class_names: of the objects.
        palette: a colour for each.
    """

    def __init__(self, class_names: list[str], palette: list[list[int]]):
        self.class_names = class_names
        self.palette = palette
        self.images = 0
        self.shown: list[tuple[Image.Image, Objects, dict]] = []  # image, what there is, what was found
        self.detail: dict = {}

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        """Add what `test_step` found."""
        self.add(outputs, batch, trainer.datamodule.preprocessing)
        self.tested += len(batch[0])

    def add(self, answers: list[dict[str, Tensor]], batch: Sequence, preprocessing: Preprocessing) -> None:
        """Add what was found in a batch."""
        images, targets = batch
        self.images += len(images)
        for image, target, found in zip(images, targets, answers, strict=True):
            if len(self.shown) == SHOWN:
                return
            height, width = target["size"]
            pixels = (255 * displayed(image, preprocessing).permute(1, 2, 0).numpy()).astype(np.uint8)
            kept = found["scores"] >= SCORE
            own = {name: value[kept].cpu().numpy() for name, value in found.items()}
            self.shown.append((Image.fromarray(pixels).resize((width, height)), target["truth"], own))

    def take(self, shares: Sequence["ObjectsRecord"]) -> None:
        """Put together the shares of several processes."""
        self.images = sum(share.images for share in shares)
        self.shown = [each for share in shares for each in share.shown][:SHOWN]

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put together what several processes have collected, and take what the task has measured."""
        super().on_test_end(trainer, pl_module)
        self.detail = pl_module.measured["test"]

    def numbers(self) -> dict[str, float | None]:
        """None but those that the task has measured."""
        return {}

    def about(self) -> dict:
        """What the numbers are of, and the average precision of each class."""
        by_class = {name: value for name, value in self.detail.items() if isinstance(value, dict)}
        averaged = sum(value is not None for value in self.detail["ap_by_class"].values())
        return {
            "classes_tested": {
                "of": len(self.class_names),
                "averaged": averaged,
                "ap": "COCO's, over the whole test: mean over IoU .50 to .95 and over the classes that have objects",
                **by_class,
            }
        }

    def draw(self, folder: Path, class_names: list[str]) -> None:
        """Average precision of each class, and the first images with what there is and what was found."""
        self._draw_by_class(folder / "ap_by_class.png")
        self._draw_objects(folder / "objects.png")

    def _draw_by_class(self, path: Path) -> None:
        found = {name: value for name, value in self.detail["ap_by_class"].items() if value is not None}
        figure = Figure(figsize=(6, 1 + 0.22 * len(found)), layout="constrained")
        axes = figure.subplots()
        axes.barh(range(len(found)), [100 * value for value in found.values()])
        axes.set_yticks(range(len(found)), list(found), fontsize=7)
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel="average precision of boxes (%)")
        figure.savefig(path, dpi=110)

    def _draw_objects(self, path: Path) -> None:
        count = max(1, len(self.shown))
        figure = Figure(figsize=(3 * count, 6.4), layout="constrained")
        columns = figure.subplots(2, count, squeeze=False).T
        for axes in figure.axes:
            axes.axis("off")
        for (image, truth, found), (above, below) in zip(self.shown, columns, strict=False):
            texts = [self.class_names[label] for label in truth.labels]
            above.imshow(drawn(image, truth.boxes, truth.labels, texts, self.palette, truth.masks))
            above.set_title("true", fontsize=8)
            texts = [
                f"{self.class_names[label]} {score:.2f}"
                for label, score in zip(found["labels"], found["scores"], strict=True)
            ]
            below.imshow(drawn(image, found["boxes"], found["labels"], texts, self.palette, found.get("masks")))
            below.set_title(f"found, score from {SCORE:g}", fontsize=8)
        figure.savefig(path, dpi=100)
