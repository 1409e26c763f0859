"""Tiny data sets in the published layouts, for the tests that read them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from visionpeft.backbones.preprocessing import Preprocessing

SMALL = Preprocessing((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 0.875)


def write_image(path: Path, value: int = 0, size: tuple[int, int] = (20, 16)) -> Path:
    """A noisy RGB image around a gray level; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 40, (size[1], size[0], 3))
    Image.fromarray((noise + value % 200).astype(np.uint8)).save(path)
    return path


def write_vtab_task(root: Path, task: str, classes: int, sizes: dict[str, int]) -> Path:
    """A task folder of the VTAB-1k archive; labels go round the classes."""
    for split, size in sizes.items():
        lines = []
        for number in range(size):
            name = f"images/{split}/{number:06d}.jpg"
            write_image(root / task / name, number)
            lines.append(f"{name} {number % classes}")
        (root / task / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root / task


def write_fgvc(root: Path, images: str, splits: dict[str, dict[str, int | str]]) -> Path:
    """An FGVC data set: a JSON file for each split and its images."""
    for split, labels in splits.items():
        for number, path in enumerate(labels):
            write_image(root / images / path, number)
        (root / f"{split}.json").write_text(json.dumps(labels))
    return root


def write_class_folders(root: Path, counts: dict[str, int]) -> Path:
    """`root/<class>/0.png, 1.png, ...`."""
    for position, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            write_image(root / name / f"{number}.png", 17 * position + number)
    return root


def truncate(path: Path) -> Path:
    """Keep the first half of a file, as an interrupted download does."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path
