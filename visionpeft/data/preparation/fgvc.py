"""A fine-grained set in the layout of VPT: images as published, and three JSON files of paths and class ids."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from visionpeft.data.aliases import choose
from visionpeft.data.annotations import read_json
from visionpeft.data.fgvc import SPLITS, fgvc_datasets
from visionpeft.data.ordering import permutation
from visionpeft.data.preparation.annotations import matlab, numbered
from visionpeft.data.preparation.download import Archive, published_archives
from visionpeft.data.preparation.staging import prepare_folder
from visionpeft.data.records import path_inside
from visionpeft.errors import DataError
from visionpeft.files import write_json

HELD_OUT = 0.1
Labels = dict[str, int]  # path in the image folder -> class id


def prepare_fgvc(
    dataset: str,
    root: Path,
    seed: int = 0,
    given: Path | None = None,
    mirror: str | None = None,
    splits: Path | None = None,
) -> tuple[Path, dict]:
    """Build `root/<published folder name>`.

    Test images are the official ones. Of all sets but Oxford Flowers the benchmark holds a tenth of the official
    training images out for selection; which ones is only in the split files of the VPT authors. Without them a tenth is
    drawn here, and the folder says `split: own`.

    Args:
        dataset: its name or a folder name of it.
        root: folder of the sets.
        seed: of that draw.
        given: a folder that may have the archives.
        mirror: address of a folder with the archives.
        splits: folder with the authors' train.json, val.json and test.json.

    Returns:
        The folder, and what is recorded in it.

    Raises:
        ConfigurationError: an unknown set.
        DataError: split files that name images the archive does not have, or what `prepare_folder` refuses.
    """
    definitions = fgvc_datasets()
    dataset = choose(dataset, {name: entry["folders"] for name, entry in definitions.items()}, "FGVC data set")
    definition = definitions[dataset]

    def write(unpacked: Path, folder: Path) -> dict:
        source, labels = SOURCES[dataset](unpacked)
        if splits is not None:
            labels = {split: read_json(splits / f"{split}.json") for split in SPLITS}
            record = {"split": "published", "rule": "split files of the VPT authors"}
        elif "val" in labels:
            record = {"split": "published", "rule": "official splits"}
        else:
            labels = _hold_out(labels, seed)
            record = {
                "split": "own",
                "rule": f"official test images; a tenth of the official training images to select on, seed {seed}",
            }
        images = folder / definition["images"]
        for split in SPLITS:
            for path in labels[split]:
                _copy(path_inside(source, path, f"{split}.json"), path_inside(images, path, f"{split}.json"))
            write_json(folder / f"{split}.json", labels[split])
        return {"dataset": "FGVC", "task": dataset, **record, "seed": seed}

    target = root / definition["folders"][0]
    archives = [Archive(**entry) for entry in published_archives()["fgvc"][dataset]]
    return target, prepare_folder(target, archives, write, given, mirror)


def _hold_out(labels: dict[str, Labels], seed: int) -> dict[str, Labels]:
    paths = list(labels["train"])
    held = {paths[i] for i in permutation(len(paths), seed)[: math.ceil(HELD_OUT * len(paths))]}
    return {
        "train": {path: label for path, label in labels["train"].items() if path not in held},
        "val": {path: label for path, label in labels["train"].items() if path in held},
        "test": labels["test"],
    }


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise DataError(f"image {source.name} is listed and not in the archive")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _birds(folder: Path) -> tuple[Path, dict[str, Labels]]:
    """CUB and NABirds: `images.txt`, `image_class_labels.txt` and `train_test_split.txt` (1 trains) by image id."""
    root = _parent(folder, "train_test_split.txt")
    paths = numbered(root / "images.txt")
    labels = numbered(root / "image_class_labels.txt")
    trains = numbered(root / "train_test_split.txt")
    return root / "images", {
        split: {path: int(labels[number]) for number, path in paths.items() if trains[number] == wanted}
        for split, wanted in (("train", "1"), ("test", "0"))
    }


def _flowers(folder: Path) -> tuple[Path, dict[str, Labels]]:
    """`imagelabels.mat` and `setid.mat`; paths such as jpg/image_00001.jpg."""
    labels = matlab(folder / "imagelabels.mat")["labels"].ravel()
    numbers = matlab(folder / "setid.mat")
    root = _parent(folder, "image_00001.jpg")
    return root.parent, {
        split: {f"{root.name}/image_{number:05d}.jpg": int(labels[number - 1]) for number in numbers[key].ravel()}
        for split, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid"))
    }


def _dogs(folder: Path) -> tuple[Path, dict[str, Labels]]:
    """`train_list.mat` and `test_list.mat`: `file_list` and `labels` from 1."""

    def read(split: str) -> Labels:
        content = matlab(_parent(folder, f"{split}_list.mat") / f"{split}_list.mat")
        return dict(zip(_texts(content["file_list"]), map(int, content["labels"].ravel()), strict=True))

    return _parent(folder, "Images") / "Images", {split: read(split) for split in ("train", "test")}


def _cars(folder: Path) -> tuple[Path, dict[str, Labels]]:
    """`annotations` of file name and class from 1; images in cars_train and cars_test."""

    def read(split: str, name: str) -> Labels:
        entries = matlab(_parent(folder, name) / name)["annotations"].ravel()
        return {f"cars_{split}/{entry['fname'].item()}": int(entry["class"].item()) for entry in entries}

    return _parent(folder, "cars_train"), {
        "train": read("train", "cars_train_annos.mat"),
        "test": read("test", "cars_test_annos_withlabels.mat"),
    }


SOURCES: dict[str, Callable[[Path], tuple[Path, dict[str, Labels]]]] = {
    "cub": _birds,
    "nabirds": _birds,
    "oxford_flowers": _flowers,
    "stanford_dogs": _dogs,
    "stanford_cars": _cars,
}


def _texts(cells: np.ndarray) -> list[str]:
    return [str(cell.item()) for cell in cells.ravel()]


def _parent(folder: Path, name: str) -> Path:
    """The folder of a file or folder somewhere below."""
    found = sorted(folder.rglob(name), key=lambda path: (len(path.parts), path))
    if not found:
        raise DataError(f"the archive has no {name}")
    return found[0].parent
