"""Cut a small set of classified 64-pixel drawings from one design family of emoji, Noto v1.

    python build.py --emoji DIR --output DIR

The source is the folder that ``examples/pretrain/prepare_emoji.py`` wrote. The classes are subgroups of the emoji.
Nearly identical drawings are dropped, and drawings that Noto's later versions kept, since nano_clip has seen those.
"""

import argparse
import csv
import random
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

FAMILY = "noto-v1"
SIZE = 64
TRAIN, VAL, TEST = 16, 4, 30  # largest numbers per class
LEAST = 8  # a class has at least as many drawings, half of them for training

CLASSES = {
    "aircraft": "transport-air",
    "arrow": "arrow",
    "bird": "animal-bird",
    "boat": "transport-water",
    "book": "book-paper",
    "bug": "animal-bug",
    "building": "place-building place-religious",
    "button": "av-symbol",
    "celebration": "event",
    "clock": "time",
    "clothing": "clothing",
    "computer": "computer",
    "dessert": "food-sweet",
    "drink": "drink",
    "face": """face-smiling face-affection face-tongue face-hand face-neutral-skeptical face-sleepy face-unwell face-hat
        face-glasses face-concerned face-negative""",
    "flag": "flag country-flag subdivision-flag",
    "flower": "plant-flower",
    "fruit": "food-fruit",
    "game": "game",
    "hand": "hand-fingers-open hand-fingers-partial hand-single-finger hand-fingers-closed hands hand-prop",
    "heart": "heart",
    "landscape": "place-geographic place-other",
    "letter": "alphanum",
    "mail": "mail",
    "mammal": "animal-mammal",
    "meal": "food-prepared food-asian",
    "money": "money currency",
    "music": "music musical-instrument",
    "office": "office",
    "person": "person person-role person-fantasy person-gesture person-activity person-resting",
    "plant": "plant-other",
    "sea animal": "animal-marine",
    "shape": "geometric",
    "sign": "transport-sign warning",
    "sky": "sky-weather",
    "sport": "sport person-sport",
    "tool": "tool",
    "vegetable": "food-vegetable",
    "vehicle": "transport-ground",
    "zodiac sign": "zodiac",
}


def read_drawing(path: Path) -> Image.Image:
    """The drawing on white."""
    with Image.open(path) as image:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def thumbnail(image: Image.Image) -> np.ndarray:
    """Means over blocks of 4 x 4 pixels."""
    return np.asarray(image, np.float32).reshape(16, 4, 16, 4, 3).mean((1, 3))


def collect(folder: Path) -> dict[str, list[tuple[str, Image.Image]]]:
    """Codes and drawings of each class."""
    with (folder / "emoji.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    later = {row["code"]: thumbnail(read_drawing(folder / row["path"])) for row in rows if row["family"] == "noto"}
    label_of = {subgroup: label for label, subgroups in CLASSES.items() for subgroup in subgroups.split()}
    drawings: dict[str, list[tuple[str, Image.Image]]] = {label: [] for label in CLASSES}
    seen: list[np.ndarray] = []
    for row in rows:
        # no combinations such as families
        if row["family"] != FAMILY or row["subgroup"] not in label_of or "-200d-" in row["code"]:
            continue
        image = read_drawing(folder / row["path"])
        small = thumbnail(image)
        known = [*seen, later[row["code"]]] if row["code"] in later else seen
        if all(np.abs(small - other).mean() >= 8 for other in known):
            seen.append(small)
            drawings[label_of[row["subgroup"]]].append((row["code"], image))
    return {label: images for label, images in drawings.items() if len(images) >= LEAST}


def main() -> None:
    """Build the set from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True, help="the folder that prepare_emoji.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="the folder of this set")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    generator = random.Random(args.seed)
    shutil.rmtree(args.output / "images", ignore_errors=True)
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "val": [], "test": []}
    for label, drawings in collect(args.emoji).items():
        folder = label.replace(" ", "_")
        (args.output / "images" / folder).mkdir(parents=True)
        generator.shuffle(drawings)
        # about half, a tenth and two fifths
        test = max(4, round(0.4 * len(drawings)))
        val = min(VAL, len(drawings) // 10)
        train = min(TRAIN, len(drawings) - test - val)
        for index, (code, image) in enumerate(drawings[: train + val + TEST]):
            name = "train" if index < train else "val" if index < train + val else "test"
            path = f"images/{folder}/{code}.png"
            image.save(args.output / path, optimize=True)
            rows[name].append((path, folder))
    for name, pairs in rows.items():
        with (args.output / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("path", "label"), *sorted(pairs)])
        print(f"{name}: {len(pairs)} drawings")


if __name__ == "__main__":
    main()
