"""What `python -m visionpeft.predict` does with a run of segmentation: a mask and an overlay for each image."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from visionpeft.data.segmentation.masks import palette_image, palette_of
from visionpeft.data.segmentation.overlays import overlay
from visionpeft.data.segmentation.transforms import MaskedTransform
from visionpeft.errors import DataError
from visionpeft.models.windows import predict_masks
from visionpeft.runs.predicted_files import named_after, readable, save_png
from visionpeft.sharing.trained_model import TrainedModel

SHOWN = 30


def write_masks(trained: TrainedModel, files: list[Path], folder: Path | None, skip_corrupt: bool) -> None:
    """Predict, print which classes each image shows, and write palette PNGs and overlays into the folder, if any.

    In the palette PNG the index of a pixel is its class; of more than 256 classes it is a 16-bit gray level.
    """
    palette = trained.palette or palette_of(len(trained.class_names))
    names = None if folder is None else named_after(files, folder, (".png", "_overlay.png"), "masks")
    table, count = Table("image", "classes by their share of pixels"), 0
    for number, image, classes in _predicted(trained, files, skip_corrupt):
        if names is not None:
            folder.mkdir(parents=True, exist_ok=True)
            mask, shown = names[number]
            save_png(palette_image(classes, palette), mask)
            save_png(overlay(image, classes, palette), shown)
        if count < SHOWN:
            table.add_row(str(files[number]), _shares(classes, trained.class_names))
        count += 1
    if not count:
        raise DataError(f"none of the {len(files)} image files can be read")
    console = Console()
    console.print(table, highlight=False)
    if count > SHOWN:
        console.print(f"and {count - SHOWN:,} more images", highlight=False)
    if folder is not None:
        console.print(f"masks and overlays of {count:,} images written to {folder}", highlight=False, soft_wrap=True)
    else:
        console.print("--output FOLDER writes a mask and an overlay of each", highlight=False)


def _predicted(
    trained: TrainedModel, files: list[Path], skip_corrupt: bool
) -> Iterator[tuple[int, Image.Image, np.ndarray]]:
    """Number of each image that can be read, the image, and its class indices (height, width)."""
    transform = MaskedTransform(trained.preprocessing, trained.size or min(trained.preprocessing.input_size))
    device = next(trained.model.parameters()).device
    for number, image in readable(files, skip_corrupt):
        pixels = transform.normalise(transform.measure(image)[None]).to(device)
        with torch.inference_mode():
            found = predict_masks(
                trained.model, pixels, window=trained.window, stride=trained.stride, size=(image.height, image.width)
            )
        yield number, image, found[0].cpu().numpy()


def _shares(classes: np.ndarray, names: list[str]) -> str:
    numbers, counts = np.unique(classes, return_counts=True)
    order = np.argsort(-counts)[:5]
    more = f", and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return ", ".join(f"{names[numbers[i]]} {100 * counts[i] / classes.size:.1f} %" for i in order) + more
