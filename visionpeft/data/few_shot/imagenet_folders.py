"""ImageNet, and the test sets shifted from it, in folders named by WordNet ids or by labels."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from visionpeft.data.few_shot.definitions import few_shot_class_names
from visionpeft.data.few_shot.place import Place, Splits, first_images_folder
from visionpeft.data.images import EXTENSIONS
from visionpeft.data.records import Row
from visionpeft.errors import DataError

WORDNET_ID = re.compile(r"n\d{8}")


def read_imagenet(definition: dict, place: Place, train: bool) -> Splits:
    """ImageNet-1k: `train/<id>/` and `val/<id>/`; the published validation images are the test split.

    Raises:
        DataError: a folder is missing, or a class folder is none of the 1,000.
    """
    needed = ("train", "val") if train else ("val",)
    images = first_images_folder(
        definition, place, lambda images: all((images / split).is_dir() for split in needed), "/".join(needed)
    )
    names = wordnet_names(definition["class_names"])
    rows, notes = {}, []
    for split, folder in {"train": "train", "test": "val"}.items():
        if split == "train" and not train:
            continue
        rows[split] = list(_class_rows(images, folder, names))
        missing = len(names) - len({row.label for row in rows[split]})
        if missing and split == "train":
            raise DataError(f"{missing} of the 1,000 class folders are missing in {images / folder}")
        if missing:
            notes.append(f"test: {missing} of 1,000 classes have no image")
    if train:
        notes.append("the images of a class are in the order of their names; the reference takes the file system's")
    return Splits(images, rows, list(names.values()), "official", notes)


def read_wordnet_folders(definition: dict, place: Place) -> Splits:
    """A test set in `<id>/`, scored over the classes that it has: all 1,000, or the 200 of ImageNet-A or -R.

    Raises:
        DataError: the folder is missing, or a class folder is none of these classes.
    """
    images = first_images_folder(
        definition, place, lambda images: any(_wordnet_ids(images)), "n01443537 and other folders"
    )
    names = wordnet_names(definition["class_names"])
    rows = list(_class_rows(images, ".", names))
    missing = len(names) - len({row.label for row in rows})
    notes = [f"test: {missing} of {len(names)} classes have no image"] if missing else []
    return Splits(images, {"test": rows}, list(names.values()), "official", notes)


def read_numbered_folders(definition: dict, place: Place) -> Splits:
    """ImageNetV2: folder j holds class j of the sorted WordNet ids; sorting the folders as text would permute them.

    Raises:
        DataError: a folder is missing.
    """
    images = first_images_folder(definition, place, lambda images: (images / "0").is_dir(), "folders 0 to 999")
    names = wordnet_names(definition["class_names"])
    rows = []
    for label in range(len(names)):
        folder = images / str(label)
        if not folder.is_dir():
            raise DataError(f"class folder {folder} of {definition['title']} does not exist; expected 0 to 999")
        rows += [Row(f"{label}/{name}", label, str(folder)) for name in image_names(folder)]
    return Splits(images, {"test": rows}, list(names.values()), "official")


def wordnet_names(name: str) -> dict[str, str]:
    """{WordNet id: class name} in the order of the labels."""
    names = few_shot_class_names(name)
    assert isinstance(names, dict)
    return names


def image_names(folder: Path) -> list[str]:
    """Names of the image files in a folder, sorted; hidden and other files are ignored."""
    return sorted(
        name for name in os.listdir(folder) if os.path.splitext(name)[1].lower() in EXTENSIONS and name[0] != "."
    )


def _wordnet_ids(folder: Path) -> Iterator[str]:
    return (entry.name for entry in os.scandir(folder) if WORDNET_ID.fullmatch(entry.name) and entry.is_dir())


def _class_rows(images: Path, folder: str, names: dict[str, str]) -> Iterator[Row]:
    """Images in `images/folder/<WordNet id>`, sorted by id and name."""
    labels = {identifier: label for label, identifier in enumerate(names)}
    found, where = sorted(_wordnet_ids(images / folder)), str(images / folder)
    if not found:
        raise DataError(
            f"{images / folder} must hold a folder for each class, named by its WordNet id (n01440764, ...)"
        )
    for identifier in found:
        if identifier not in labels:
            raise DataError(f"{images / folder / identifier} is none of the {len(names)} classes of this data set")
        for name in image_names(images / folder / identifier):
            path = f"{identifier}/{name}" if folder == "." else f"{folder}/{identifier}/{name}"
            yield Row(path, labels[identifier], where)
