"""Runs of segmentation that take seconds: a tiny untrained backbone on squares of two colours with their masks."""

from pathlib import Path

import numpy as np
from PIL import Image
from small_runs import BACKBONE

from visionpeft import fit

CLASSES = ["ground", "blue", "red"]


def draw_masked(folder: Path, count: int = 12, size: tuple[int, int] = (32, 32)) -> Path:
    """Images (height, width) of gray noise with a blue and a red square, and their masks as palette PNGs."""
    generator = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        pixels = generator.integers(90, 160, (*size, 3)).astype(np.uint8)
        classes = np.zeros(size, np.uint8)
        for label, colour in ((1, (20, 20, 250)), (2, (250, 20, 20))):
            top, left = generator.integers(0, min(size) - 14, 2)
            classes[top : top + 14, left : left + 14] = label
            pixels[top : top + 14, left : left + 14] = colour
        Image.fromarray(pixels).save(folder / "images" / f"{index:02d}.png")
        mask = Image.fromarray(classes, mode="L")
        mask.putpalette([9, 9, 9, 0, 200, 0, 200, 0, 0])  # colours that are not the classes
        mask.save(folder / "masks" / f"{index:02d}.png")
    return folder


def mask_arguments(folder: Path, *more: str, epochs: int = 2, figures: bool = False) -> list[str]:
    """Command line of a run of LoRA on such images."""
    return [
        *("--config", "scenes_lora.yaml", *BACKBONE, "--model.method.rank", "2"),
        *("--data", "MaskFolder", "--data.root", str(folder), "--data.classes", "[ground, blue, red]"),
        *("--data.size", "32", "--data.batch_size", "4", "--model.optimisation.lr", "2e-2"),
        *("--trainer.max_epochs", str(epochs), "--trainer.accelerator", "cpu", "--figures", str(figures).lower()),
        *more,
    ]


def run_masks(output: Path, folder: Path, *more: str, epochs: int = 2, figures: bool = False) -> Path:
    """Train in this process and return the new run directory."""
    before = set(output.glob("*"))
    assert fit.main([*mask_arguments(folder, *more, epochs=epochs, figures=figures), "--output", str(output)]) == 0
    (made,) = set(output.glob("*")) - before
    return made
