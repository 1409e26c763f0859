"""Few-shot benchmark sets as they lie on disk: split_zhou files, ImageNet and its variants, FGVC-Aircraft, own images.

Layouts are those of CoOp (Zhou et al. 2022, "Learning to Prompt for Vision-Language Models", arXiv 2109.01134).
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

from visionpeft.data.annotations import read_text
from visionpeft.data.few_shot.definitions import few_shot_class_names
from visionpeft.data.few_shot.imagenet_folders import read_imagenet, read_numbered_folders, read_wordnet_folders
from visionpeft.data.few_shot.place import Place, Splits, first_folder, images_folder
from visionpeft.data.few_shot.split_zhou import SPLITS, read_split_zhou
from visionpeft.data.image_folder import ImageFolder
from visionpeft.data.image_list import ImageList
from visionpeft.data.records import ImageSet, Row
from visionpeft.errors import DataError
from visionpeft.files import shipped


def read_splits(key: str, definition: dict, place: Place, *, own: bool = False, train: bool = True) -> Splits:
    """The splits of a data set of the benchmark.

    Args:
        key: of the data set.
        definition: its entry of `few_shot_datasets()`.
        place: where it is.
        own: read the split that `python -m visionpeft.prepare few_shot` has built.
        train: ImageNet's train split is wanted, too.

    Raises:
        DataError: something is missing or malformed; the sentence says where it is published.
    """
    layout = definition["layout"]
    if own and layout != "split_json":
        raise DataError(f"{definition['title']} has an official split; leave out split='own'")
    if layout == "lists":
        splits = _embedded(key, definition)
    elif layout == "split_json":
        splits = read_split_zhou(key, definition, place, own)
    elif layout == "aircraft":
        splits = _aircraft(definition, place)
    elif layout == "imagenet":
        splits = read_imagenet(definition, place, train)
    elif layout == "numbered_folders":
        splits = read_numbered_folders(definition, place)
    else:
        splits = read_wordnet_folders(definition, place)
    if not own:
        splits.notes.extend(_differences(splits, definition))
    return splits


def read_image_folder(root: Path, val_fraction: float, test_fraction: float) -> Splits:
    """People's own images in a folder for each class, as `ImageFolder` reads and divides them."""
    images = ImageFolder(root, val_fraction, test_fraction).images
    return _of_images(images, root, f"image folder; {images.about['split']}")


def read_image_lists(root: Path, class_names: list[str] | None) -> Splits:
    """People's own lists `train` and where there are any `val` and `test`, .csv or .json, as `ImageList` reads them."""
    files = {split: _list_file(root, split) for split in SPLITS}
    if files["train"] is None:
        raise DataError(f"dataset 'list' needs {root / 'train.csv'} (or train.json), with val and test beside it")
    return _of_images(ImageList(**files, root=root, class_names=class_names).images, root, "lists")


def _aircraft(definition: dict, place: Place) -> Splits:
    folder = first_folder(definition, place, lambda folder: (folder / "variants.txt").is_file(), "variants.txt")
    variants = [line.strip() for line in read_text(folder / "variants.txt").splitlines() if line.strip()]
    labels = {name: label for label, name in enumerate(variants)}
    rows: dict[str, list[Row]] = {}
    for split in SPLITS:
        file = folder / f"images_variant_{split}.txt"
        rows[split] = []
        for number, line in enumerate(filter(str.strip, read_text(file).splitlines()), start=1):
            image, _, name = line.strip().partition(" ")
            if name.strip() not in labels:
                raise DataError(f"{file} line {number}: variant '{name.strip()}' is not in {folder / 'variants.txt'}")
            rows[split].append(Row(f"{image}.jpg", labels[name.strip()], f"{file} line {number}"))
    return Splits(images_folder(definition, place, folder), rows, variants, "official")


def _embedded(key: str, definition: dict) -> Splits:
    folder = shipped("datasets") / key
    if _list_file(folder, "train") is None:
        raise DataError(
            f"the embedded set {definition['title']} is not installed: {folder / 'train.csv'} does not exist"
        )
    read = _read_embedded(folder)
    return replace(read, rows={split: [*rows] for split, rows in read.rows.items()}, notes=[*read.notes])


@cache
def _read_embedded(folder: Path) -> Splits:
    """Read once in a process: a protocol asks for it in every cell, and nobody writes to what is in the package."""
    files = {split: _list_file(folder, split) for split in SPLITS}
    return _of_images(ImageList(**files, root=folder).images, folder, "embedded")


def _of_images(images: ImageSet, folder: Path, origin: str) -> Splits:
    rows = {
        split: [
            Row(path.relative_to(folder).as_posix(), label, str(path))
            for path, label in zip(source.paths, source.labels, strict=True)
        ]
        for split, source in images.sources.items()
    }
    return Splits(folder, rows, [name.replace("_", " ") for name in images.class_names], origin, list(images.notes))


def _list_file(folder: Path, split: str) -> Path | None:
    return next((file for end in ("csv", "json") if (file := folder / f"{split}.{end}").is_file()), None)


def _differences(splits: Splits, definition: dict) -> list[str]:
    """Where a data set is not as published."""
    found = {"classes": len(splits.class_names)} | {split: len(rows) for split, rows in splits.rows.items()}
    notes = [
        f"{key}: {count:,} found, {definition[key]:,} published"
        for key, count in found.items()
        if definition.get(key) not in (None, count)
    ]
    if definition["class_names"] and found["classes"] == definition["classes"]:
        known = few_shot_class_names(definition["class_names"])
        known = list(known.values()) if isinstance(known, dict) else known
        others = [
            f"'{name}' for '{other}'" for name, other in zip(splits.class_names, known, strict=True) if name != other
        ]
        if others:
            notes.append(
                f"class names that differ from those shipped: {', '.join(others[:5])}" + ", ..." * (len(others) > 5)
            )
    return notes
