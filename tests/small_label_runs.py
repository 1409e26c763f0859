"""Tiny images whose colours say several labels each, or a number, in lists; and runs on them."""

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image
from small_runs import BACKBONE

from visionpeft import fit

CHANNELS = ("red", "green", "blue")
SPLITS = {"train": 24, "val": 8, "test": 12}


def draw(folder: Path, seed: int = 0) -> dict[str, list[tuple[str, list[str], float]]]:
    """Noisy squares; of each split the path, the channels that are bright, and the brightness in years about 2000."""
    generator = np.random.default_rng(seed)
    rows = {}
    (folder / "images").mkdir(parents=True)
    for split, count in SPLITS.items():
        rows[split] = []
        for index in range(count):
            # Every third of them is dark, so that an image may have no label.
            on = np.array([(index >> bit) & 1 for bit in range(3)], bool)
            level = generator.uniform(0, 1)
            pixels = 40 + 150 * on * 1.0 + np.zeros((32, 32, 3))
            pixels[16:] = 255 * level  # the lower half is grey
            pixels = np.clip(pixels + generator.integers(-10, 10, pixels.shape), 0, 255).astype(np.uint8)
            path = f"images/{split}{index}.png"
            Image.fromarray(pixels).save(folder / path)
            rows[split].append((path, [name for name, one in zip(CHANNELS, on, strict=True) if one], 1990 + 20 * level))
    return rows


def write_lists(folder: Path, rows: dict, labels: str, suffix: str = "csv") -> list[str]:
    """One list for each split, and the options that name them."""
    options = ["--data", "ImageList", "--data.root", "auto", "--data.labels", labels]
    for split, entries in rows.items():
        pairs = [(path, names if labels == "several" else number) for path, names, number in entries]
        file = folder / f"{split}-{labels}.{suffix}"
        if suffix == "json":
            file.write_text(json.dumps([{"path": path, "label": label} for path, label in pairs]))
        else:
            with file.open("w", newline="") as target:
                written = [(path, ";".join(label) if labels == "several" else repr(label)) for path, label in pairs]
                csv.writer(target).writerows([("path", "label"), *written])
        options += [f"--data.{split}", str(file)]
    return options


def arguments(options: list[str], *more: str, epochs: int = 3, figures: bool = False) -> list[str]:
    """Command line of a run of LoRA on such lists."""
    return [
        *("--config", "images_lora.yaml", *BACKBONE, *options, "--data.batch_size", "8"),
        *("--model.optimisation.warmup_epochs", "1", "--model.optimisation.lr", "0.01"),
        *("--trainer.max_epochs", str(epochs), "--trainer.accelerator", "cpu", "--figures", str(figures).lower()),
        *more,
    ]


def run(folder: Path, options: list[str], *more: str, epochs: int = 3, figures: bool = False) -> Path:
    """Train in this process and return the new run directory."""
    before = set(folder.glob("*"))
    assert fit.main([*arguments(options, *more, epochs=epochs, figures=figures), "--output", str(folder)]) == 0
    (made,) = set(folder.glob("*")) - before
    return made
