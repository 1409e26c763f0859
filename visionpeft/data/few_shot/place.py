"""Where a set of the few-shot benchmark lies, and what its images and splits are before any are drawn."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from visionpeft.data.records import Row
from visionpeft.errors import DataError


@dataclass(frozen=True)
class Splits:
    """Images with labels by split, before any are drawn.

    Args:
        folder: what the paths are relative to.
        rows: path, class index and origin of each image of "train", "val" and "test", as far as there are such.
        class_names: in the order of the labels.
        origin: whose split it is.
        notes: remarks for the record.
    """

    folder: Path
    rows: dict[str, list[Row]]
    class_names: list[str]
    origin: str
    notes: list[str] = field(default_factory=list)

    @cached_property
    def sha256(self) -> str:
        """Hash of paths, labels and their order, by which a stored draw knows its split."""
        content = {split: [[row.path, row.label] for row in rows] for split, rows in self.rows.items()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Place:
    """Where a data set is looked for.

    Args:
        root: folder of all data sets, or of this one.
        folder: the data set's own folder, in place of its usual names.
        image_folder: folder of the images in that, in place of the usual ones.
        split_file: split file, in place of the one in the data set's folder.
    """

    root: Path
    folder: str | Path | None = None
    image_folder: str | Path | None = None
    split_file: str | Path | None = None

    def folders(self, definition: dict) -> list[Path]:
        """Folders in which the data set may be: the first that exists is likely meant."""
        if self.folder is not None:
            return [self.root / self.folder]
        return [*(self.root / name for name in definition["folders"]), self.root]

    def images(self, definition: dict, folder: Path) -> list[Path]:
        """Folders in which the images may be."""
        names = definition["images"] if self.image_folder is None else [self.image_folder]
        return [folder / name for name in names]


def images_folder(definition: dict, place: Place, folder: Path) -> Path:
    """The folder of the images in the data set's own.

    Raises:
        DataError: it does not exist.
    """
    candidates = place.images(definition, folder)
    for images in candidates:
        if images.is_dir():
            return images
    raise DataError(
        f"image folder {candidates[0]} of {definition['title']} does not exist; the images come from "
        f"{definition['source']} (image_folder names another place)"
    )


def first_folder(definition: dict, place: Place, fits: Callable[[Path], bool], what: str) -> Path:
    """The first folder of the data set that `fits`; raises DataError naming `what` it must hold when there is none."""
    candidates = place.folders(definition)
    for folder in candidates:
        if fits(folder):
            return folder
    raise DataError(
        f"{definition['title']} is not under {place.root}: expected {candidates[0]} with {what}; it comes from "
        f"{definition['source']}"
    )


def first_images_folder(definition: dict, place: Place, fits: Callable[[Path], bool], what: str) -> Path:
    """The first image folder that `fits`; raises DataError naming `what` it must hold when there is none."""
    candidates = [images for folder in place.folders(definition) for images in place.images(definition, folder)]
    for images in candidates:
        if images.is_dir() and fits(images):
            return images
    raise DataError(
        f"{definition['title']} is not under {place.root}: expected {candidates[0]} with {what}; it comes from "
        f"{definition['source']}"
    )
