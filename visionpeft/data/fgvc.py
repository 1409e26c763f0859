"""The five fine-grained sets of the FGVC benchmark, in the layout of VPT (Jia et al. 2022, arXiv 2203.12119)."""

import json
from pathlib import Path
from typing import Literal

from visionpeft.backbones.preprocessing import Resize
from visionpeft.data.aliases import choose
from visionpeft.data.annotations import read_json
from visionpeft.data.module import ImageDataModule
from visionpeft.data.prepared import prepared_notes
from visionpeft.data.records import ImageFiles, ImageSet, Row, check_disjoint, path_inside
from visionpeft.data.transforms import Augmentation
from visionpeft.errors import ConfigurationError, DataError
from visionpeft.files import shipped

SPLITS = ("train", "val", "test")


def fgvc_datasets() -> dict[str, dict]:
    """Published definition of each set: folder names, image folder, classes, split sizes, source."""
    return json.loads((shipped("datasets") / "fgvc.json").read_text(encoding="utf-8"))["datasets"]


class FGVC(ImageDataModule):
    """One fine-grained set: `root/{train,val,test}.json`, each `{relative image path: class id}`.

    Class ids are arbitrary; they are numbered in sorted order over all three files, so that a split that lacks a class
    does not shift the others. Sizes that differ from the published ones are noted in `description()`.

    Args:
        dataset: cub, nabirds, oxford_flowers, stanford_dogs or stanford_cars.
        root: folder with the three JSON files and the images, or its parent.
        train_on: "train" selects on val; "train+val" trains on both and selects on nothing.
        resize: "squash" to the input size, or "crop": resize to cover, then cut.
        augmentation: of training images: "none", "crop_flip" (as VPT) or "random_resized_crop" (as SSF, adapter_plus).

    Raises:
        ConfigurationError: an unknown data set.
        DataError: a file that is missing or malformed, a path outside the folder, an image in two splits, or a class
            without training images.
    """

    def __init__(
        self,
        dataset: str,
        root: str | Path,
        train_on: Literal["train", "train+val"] = "train",
        resize: Resize = "crop",
        augmentation: Augmentation = "crop_flip",
        **kwargs,
    ):
        definitions = fgvc_datasets()
        dataset = choose(dataset, {name: entry["folders"] for name, entry in definitions.items()}, "FGVC data set")
        if train_on not in ("train", "train+val"):
            raise ConfigurationError(f"unknown train_on '{train_on}': choose train or train+val")
        definition = definitions[dataset]
        folder = _folder(Path(root), dataset, definition)
        splits = {split: _read_split(folder / f"{split}.json") for split in SPLITS}
        check_disjoint(splits)
        ids = _sorted_ids(splits, folder)
        notes = [*_differences(splits, len(ids), definition), *prepared_notes(folder)]
        if train_on == "train+val":
            splits = {"train": splits["train"] + splits["val"], "test": splits["test"]}
        images = folder / definition["images"]
        index = {label: position for position, label in enumerate(ids)}
        sources = {
            split: ImageFiles(
                [path_inside(images, row.path, row.where) for row in rows], [index[row.label] for row in rows]
            )
            for split, rows in splits.items()
        }
        about = {
            "dataset": "FGVC",
            "task": dataset,
            "trained_on": train_on,
            "selected_on": "val" if train_on == "train" else None,
        }
        names = [str(label) for label in ids]
        super().__init__(ImageSet(sources, names, about, notes), resize=resize, augmentation=augmentation, **kwargs)


def _folder(root: Path, dataset: str, definition: dict) -> Path:
    for folder in (root, root / dataset, *(root / name for name in definition["folders"])):
        if (folder / "train.json").is_file():
            return folder
    raise DataError(
        f"FGVC data set '{dataset}' needs {root / 'train.json'} (with val.json, test.json and the images), which does "
        f"not exist; images come from {definition['source']}, split files from the VPT authors (github.com/KMnP/vpt)"
    )


def _read_split(file: Path) -> list[Row]:
    content = read_json(file)
    if not isinstance(content, dict) or not content:
        raise DataError(f"{file} must be a JSON object of image paths and class ids, and not empty")
    for path, label in content.items():
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise DataError(f"{file}: image '{path}' needs an integer or string class id, found {json.dumps(label)}")
    return [Row(path, label, str(file)) for path, label in content.items()]


def _sorted_ids(splits: dict[str, list[Row]], folder: Path) -> list[int] | list[str]:
    ids = {row.label for rows in splits.values() for row in rows}
    if len({type(label) for label in ids}) > 1:
        raise DataError(f"the split files in {folder} mix integers and strings as class ids; use one kind")
    return sorted(ids)


def _differences(splits: dict[str, list[Row]], classes: int, definition: dict) -> list[str]:
    found = {"classes": classes} | {split: len(rows) for split, rows in splits.items()}
    return [
        f"{key}: {count:,} found, {definition[key]:,} published"
        for key, count in found.items()
        if count != definition[key]
    ]
