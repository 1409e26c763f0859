"""Choose the drawings that move in the embedded video set, and write sprites.json.

A drawing serves if it covers a fair share of its square once its white surroundings are cut away, and looks different
in every rotation, so that turning can be seen: the mean difference between it and its rotations by 30, 60, ... degrees,
over its mean opacity. The drawings of each split of the clip-art set that differ most from their rotations are taken.

    python datasets/motion/build.py
"""

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

from visionpeft.data.cut_out import cut_out

COVERAGE = (0.25, 0.8)
COUNTS = {"train": 200, "val": 80, "test": 240}


def asymmetry(sprite: Image.Image) -> float:
    """Smallest difference between a sprite and its rotations."""
    premultiplied = sprite.convert("RGBa")
    pixels = _pixels(premultiplied)
    turned = [_pixels(premultiplied.rotate(angle, Image.Resampling.BILINEAR)) for angle in range(30, 360, 30)]
    return min(np.abs(other - pixels).mean() for other in turned) / pixels[..., 3].mean()


def _pixels(image: Image.Image) -> np.ndarray:
    return np.frombuffer(image.tobytes(), np.uint8).reshape(*image.size, 4).astype(np.float64)


def main() -> None:
    """Write sprites.json beside this file."""
    here = Path(__file__).resolve().parent
    clipart = here.parent / "clipart"
    chosen = {}
    for split, count in COUNTS.items():
        with (clipart / f"{split}.csv").open(encoding="utf-8") as file:
            paths = [row["path"] for row in csv.DictReader(file)]
        cut = {path: cut_out(Image.open(clipart / path)) for path in paths}
        covered = {path: _pixels(sprite)[..., 3].mean() / 255 for path, sprite in cut.items()}
        able = [path for path in paths if COVERAGE[0] <= covered[path] <= COVERAGE[1]]
        able.sort(key=lambda path: -asymmetry(cut[path]))
        chosen[split] = sorted(able[:count])
    (here / "sprites.json").write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
