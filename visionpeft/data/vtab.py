"""VTAB-1k (Zhai et al. 2019, arXiv 1910.04867): 19 tasks with 1,000 training images each.

Read from the layout of the community archive (NOAH, PETL-ViT, RepAdapter, SPT): `root/<task>/<split>.txt`, each line
`images/<split>/000000.jpg <label>`, for the splits train800, val200, train800val200 and test. The two dSprites tasks
are rendered where no root is given.
"""

import json
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from visionpeft.data import dsprites
from visionpeft.data.aliases import choose
from visionpeft.data.annotations import read_split_lines
from visionpeft.data.module import ImageDataModule
from visionpeft.data.ordering import permutation
from visionpeft.data.prepared import prepared_notes
from visionpeft.data.records import ImageFiles, ImageSet, Row, Source, path_inside, without_duplicates
from visionpeft.errors import ConfigurationError, DataError
from visionpeft.files import shipped

DSPRITES_SEED = 0
PUBLISHED_SIZES = {"train800": 800, "val200": 200, "train800val200": 1000}


def vtab1k_tasks() -> dict[str, dict]:
    """Published definition of each task: group, class count, test size, aliases, class names where listed, source."""
    return json.loads((shipped("datasets") / "vtab1k.json").read_text(encoding="utf-8"))["tasks"]


class VTAB1k(ImageDataModule):
    """One task of VTAB-1k.

    The protocol: choose hyper-parameters with `train800`, which selects on val200; then train on `train800val200`,
    which has no validation data, and report the test accuracy of the last epoch. Images are squashed to the input size
    and not augmented.

    Without a root, `dsprites_loc` and `dsprites_ori` are rendered (see `visionpeft.data.dsprites`). TFDS' shuffled
    order of the published array cannot be reproduced, so the 737,280 images are divided 80/10/10 in a fixed order of
    our own: train800 is the first 800 of train, val200 the first 200 of validation, test all 73,728 of test.

    Args:
        task: task name, such as cifar, dsprites_ori or smallnorb_azi.
        root: folder of the task folders; absent for rendered tasks.
        train_on: "train800" or "train800val200".

    Raises:
        ConfigurationError: an unknown task or split.
        DataError: no root for a task that is not rendered, a missing split file, a malformed line, a label out of
            range, or an image with two labels. Classes without training images are allowed: with 1,000 images the
            published splits of some tasks have such.
    """

    def __init__(
        self,
        task: str = "dsprites_loc",
        root: str | Path | None = None,
        train_on: Literal["train800", "train800val200"] = "train800val200",
        **kwargs,
    ):
        tasks = vtab1k_tasks()
        task = choose(task, {name: entry["aliases"] for name, entry in tasks.items()}, "VTAB-1k task")
        if train_on not in ("train800", "train800val200"):
            raise ConfigurationError(f"unknown train_on '{train_on}': choose train800 or train800val200")
        definition = tasks[task]
        if root is None:
            sources: dict[str, Source] = _rendered(task, definition, train_on)
            notes = ["rendered; outlines and division into splits are not those of TFDS"]
        else:
            folder = _folder(Path(root), task, definition)
            splits = {"train": _train_rows(folder, train_on, definition["classes"])}
            if train_on == "train800":
                splits["val"] = _rows(folder, "val200", definition["classes"])
            splits["test"] = _rows(folder, "test", definition["classes"])
            sources = {split: _files(folder, rows) for split, rows in splits.items()}
            notes = [*_differences(sources, train_on, definition), *prepared_notes(folder)]
            if train_on == "train800val200" and not (folder / "train800val200.txt").is_file():
                notes.append("train800val200.txt is absent: train800.txt and val200.txt together")
        untrained = definition["classes"] - len(set(sources["train"].labels))
        if untrained:
            notes.append(f"{untrained} of {definition['classes']} classes have no training image")
        names = definition.get("names") or [f"class {index}" for index in range(definition["classes"])]
        about = {
            "dataset": "VTAB-1k",
            "task": task,
            "group": definition["group"],
            "trained_on": train_on,
            "selected_on": "val200" if train_on == "train800" else None,
            "rendered": root is None,
        }
        super().__init__(ImageSet(sources, names, about, notes, untrained_classes=True), **kwargs)


def _rendered(task: str, definition: dict, train_on: str) -> dict[str, Source]:
    factor = definition.get("rendered_factor")
    if factor is None:
        raise DataError(
            f"VTAB-1k task '{task}' needs root, the folder that holds {task}/{train_on}.txt; it comes from the "
            "community VTAB-1k archive (NOAH, RepAdapter); only dsprites_loc and dsprites_ori are rendered without one"
        )
    train, val, test = np.split(_order(), [dsprites.COUNT * 8 // 10, dsprites.COUNT * 9 // 10])
    if train_on == "train800":
        indices = {"train": train[:800], "val": val[:200], "test": test}
    else:
        indices = {"train": np.concatenate([train[:800], val[:200]]), "test": test}
    return {split: dsprites.Sprites(members, factor) for split, members in indices.items()}


@cache
def _order() -> np.ndarray:
    """All rendered images in the order in which they are divided; drawn once, as it takes longer than all else here."""
    order = permutation(dsprites.COUNT, DSPRITES_SEED)
    order.flags.writeable = False
    return order


def _folder(root: Path, task: str, definition: dict) -> Path:
    for name in (task, *definition["aliases"]):
        if (root / name).is_dir():
            return root / name
    raise DataError(
        f"VTAB-1k task folder {root / task} does not exist; it comes from the community VTAB-1k archive "
        f"(NOAH, RepAdapter), made from the TFDS data set {definition['tfds']}"
    )


def _rows(folder: Path, split: str, classes: int) -> list[Row]:
    file = folder / f"{split}.txt"
    if not file.is_file():
        raise DataError(
            f"VTAB-1k split file {file} does not exist; each task folder of the community VTAB-1k archive has "
            "train800.txt, val200.txt, train800val200.txt and test.txt"
        )
    return without_duplicates(read_split_lines(file, classes))


def _train_rows(folder: Path, train_on: str, classes: int) -> list[Row]:
    # The archive's train800val200 repeats the images of its two parts, in this order; some copies leave it out.
    if train_on == "train800val200" and not (folder / "train800val200.txt").is_file():
        return _rows(folder, "train800", classes) + _rows(folder, "val200", classes)
    return _rows(folder, train_on, classes)


def _files(folder: Path, rows: list[Row]) -> ImageFiles:
    return ImageFiles([path_inside(folder, row.path, row.where) for row in rows], [int(row.label) for row in rows])


def _differences(sources: dict[str, Source], train_on: str, definition: dict) -> list[str]:
    published = {"train": PUBLISHED_SIZES[train_on], "val": PUBLISHED_SIZES["val200"], "test": definition["test"]}
    return [
        f"{split}: {len(source):,} images found, {published[split]:,} published"
        for split, source in sources.items()
        if len(source) != published[split]
    ]
