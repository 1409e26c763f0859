"""Choose the drawings that scenes are composed of, and write drawings.json.

A drawing serves if it covers a fair share of its square once its white surroundings are cut away: outlines on white
leave little, and what is opaque to its borders is no object.

    python datasets/scenes/build.py
"""

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

from visionpeft.data.cut_out import cut_out

COVERAGE = (0.15, 0.95)
CLASSES = {
    "animal": ("birds", "bugs", "mammals"),
    "building": ("buildings",),
    "flag": ("flags",),
    "person": ("people", "stick_figures"),
    "plant": ("plants", "fruit"),
    "vehicle": ("vehicles",),
    "thing": ("clothing", "computers", "desserts", "drinks", "electronics", "music", "office", "tools"),
}
# The clip art's test split is its largest: scenes to train on are made of it, and those to test on of its train split.
SPLITS = {"train": "test", "val": "val", "test": "train"}


def main() -> None:
    """Write drawings.json beside this file: {split: {class: [path, ...]}}."""
    here = Path(__file__).resolve().parent
    clipart = here.parent / "clipart"
    chosen = {}
    for split, source in SPLITS.items():
        with (clipart / f"{source}.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        chosen[split] = {
            name: sorted(row["path"] for row in rows if row["label"] in labels and _covers(clipart / row["path"], name))
            for name, labels in CLASSES.items()
        }
    (here / "drawings.json").write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")


def _covers(path: Path, name: str) -> bool:
    opaque = (np.asarray(cut_out(Image.open(path)))[..., 3] > 0).mean()
    return COVERAGE[0] <= opaque and (opaque <= COVERAGE[1] or name == "flag")


if __name__ == "__main__":
    main()
