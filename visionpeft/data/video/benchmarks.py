"""Published video data sets: Kinetics, Something-Something v2, HMDB51 and UCF101.

Each is trained on its training list and tested on the list that results are published on, which is never selected on:
for selection, `val_fraction` of each class can be held out of the training list.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from visionpeft.data.ordering import permutation
from visionpeft.data.records import ImageSet, Row, check_disjoint, path_inside, without_duplicates
from visionpeft.data.video.annotations import (
    read_hmdb51,
    read_kinetics,
    read_something,
    read_something_classes,
    read_ucf101,
)
from visionpeft.data.video.files import VideoFiles
from visionpeft.data.video.module import VideoDataModule, video_set
from visionpeft.data.video.reading import EXTENSIONS
from visionpeft.errors import ConfigurationError, DataError


class Kinetics(VideoDataModule):
    """Kinetics-400, -600 or -700 (Kay et al. 2017, arXiv 1705.06950).

    Videos lie anywhere under the root, named `{youtube_id}_{time_start}_{time_end}` with six-digit times; where there
    are two, the one in a folder named like "replacement..." is taken.

    Args:
        root: folder of the videos.
        train: annotations of the training videos; in the root or its folder `annotations`, or a path.
        test: annotations of the videos to test on, published results being on the validation list.
        val_fraction: share of each class of the training videos held out for selection.
        split_seed: seed of that.
        skip_missing: leave out videos that are not there (they vanish from their source) and count them.

    Raises:
        DataError: annotations are missing or malformed, or videos are missing.
    """

    def __init__(
        self,
        root: str | Path,
        train: str = "train.csv",
        test: str = "val.csv",
        val_fraction: float = 0.0,
        split_seed: int = 0,
        skip_missing: bool = False,
        **kwargs,
    ):
        root = Path(root)
        files = {
            split: _first_file(root, (name, f"annotations/{name}"), f"{split} annotations of Kinetics")
            for split, name in (("train", train), ("test", test))
        }
        rows = {split: read_kinetics(file) for split, file in files.items()}
        class_names = sorted({row.label for row in rows["train"]})
        index = {name: label for label, name in enumerate(class_names)}
        for row in rows["test"]:
            if row.label not in index:
                raise DataError(f"{row.where}: class '{row.label}' has no training video in {files['train']}")
        rows = {split: [replace(row, label=index[row.label]) for row in part] for split, part in rows.items()}
        found = _videos_by_name(root)
        videos = _benchmark(
            f"Kinetics-{len(class_names)}",
            rows,
            class_names,
            lambda row: found.get(row.path, root / f"{row.path}.mp4"),
            (val_fraction, split_seed, lambda row: row.path),
            skip_missing,
        )
        super().__init__(videos, **kwargs)


class SomethingSomethingV2(VideoDataModule):
    """Something-Something v2 (Goyal et al. 2017, arXiv 1706.04261). Left and right matter: clips are not mirrored.

    Annotations are `something-something-v2-{train,validation,labels}.json`, or without that prefix, in the root or its
    folder `labels`; videos are `<id>.webm` (or `.mp4`) in the root or its folder `20bn-something-something-v2`.

    Args:
        root: the folder.
        val_fraction: share of each class of the training videos held out for selection.
        split_seed: seed of that.
        skip_missing: leave out videos that are not there and count them.
        mirrored: take a mirrored video to keep its label, so that `augmentation.flip` is allowed. It does not in
            classes such as "Pushing something from left to right"; AIM's authors mirror half of the clips all the same.

    Raises:
        DataError: annotations are missing or malformed, or videos are missing.
    """

    def __init__(
        self,
        root: str | Path,
        val_fraction: float = 0.0,
        split_seed: int = 0,
        skip_missing: bool = False,
        mirrored: bool = False,
        **kwargs,
    ):
        root = Path(root)
        files = {
            name: _first_file(
                root,
                [
                    f"{folder}{prefix}{name}.json"
                    for prefix in ("something-something-v2-", "")
                    for folder in ("", "labels/")
                ],
                f"{name} annotations of Something-Something v2",
            )
            for name in ("labels", "train", "validation")
        }
        class_names = read_something_classes(files["labels"])
        rows = {
            "train": read_something(files["train"], class_names),
            "test": read_something(files["validation"], class_names),
        }
        folder = _first_folder(root, ("20bn-something-something-v2", "videos"))
        found = {path.stem: path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS}
        videos = _benchmark(
            "Something-Something v2",
            rows,
            class_names,
            lambda row: found.get(row.path, folder / f"{row.path}.webm"),
            (val_fraction, split_seed, lambda row: row.path),
            skip_missing,
        )
        super().__init__(videos, mirrored=mirrored, **kwargs)


class HMDB51(VideoDataModule):
    """HMDB51 (Kuehne et al. 2011, "HMDB: A Large Video Database for Human Motion Recognition").

    Videos are `<class>/<name>.avi` in the root or its folder `hmdb51_org` or `videos`; split files are in the root or
    its folder `testTrainMulti_7030_splits` or `splits`.

    Args:
        root: the folder.
        split: 1, 2 or 3.
        val_fraction: share of each class of the training videos held out for selection, whole films at a time.
        split_seed: seed of that.
        skip_missing: leave out videos that are not there and count them.

    Raises:
        DataError: split files are missing or malformed, or videos are missing.
    """

    def __init__(
        self,
        root: str | Path,
        split: int = 1,
        val_fraction: float = 0.0,
        split_seed: int = 0,
        skip_missing: bool = False,
        **kwargs,
    ):
        root = Path(root)
        _check_split(split)
        rows, class_names = read_hmdb51(_first_folder(root, ("testTrainMulti_7030_splits", "splits")), split)
        folder = _first_folder(root, ("hmdb51_org", "videos"))

        def film(row: Row) -> str:
            """What the name says before the class."""
            return Path(row.path).name.partition(f"_{class_names[row.label]}_")[0]

        videos = _benchmark(
            "HMDB51",
            rows,
            class_names,
            lambda row: path_inside(folder, row.path, row.where, "video"),
            (val_fraction, split_seed, film),
            skip_missing,
            f"split {split}",
        )
        super().__init__(videos, **kwargs)


class UCF101(VideoDataModule):
    """UCF101 (Soomro et al. 2012, arXiv 1212.0402).

    Videos are `<class>/<name>.avi` in the root or its folder `UCF-101` or `videos`; split files are in the root or its
    folder `ucfTrainTestlist`.

    Args:
        root: the folder.
        split: 1, 2 or 3.
        val_fraction: share of each class of the training videos held out for selection, whole groups at a time.
        split_seed: seed of that.
        skip_missing: leave out videos that are not there and count them.

    Raises:
        DataError: split files are missing or malformed, or videos are missing.
    """

    def __init__(
        self,
        root: str | Path,
        split: int = 1,
        val_fraction: float = 0.0,
        split_seed: int = 0,
        skip_missing: bool = False,
        **kwargs,
    ):
        root = Path(root)
        _check_split(split)
        rows, class_names = read_ucf101(_first_folder(root, ("ucfTrainTestlist",)), split)
        folder = _first_folder(root, ("UCF-101", "videos"))

        videos = _benchmark(
            "UCF101",
            rows,
            class_names,
            lambda row: path_inside(folder, row.path, row.where, "video"),
            # Clips of one group, v_<class>_g<group>_c<clip>, are cut from one recording.
            (val_fraction, split_seed, lambda row: re.sub(r"_c\d+\.\w+$", "", row.path)),
            skip_missing,
            f"split {split}",
        )
        super().__init__(videos, **kwargs)


HeldOut = tuple[float, int, Callable[[Row], str]]  # fraction, seed, what must stay together


def _benchmark(
    name: str,
    rows: dict[str, list[Row]],
    class_names: list[str],
    place: Callable[[Row], Path],
    held_out: HeldOut,
    skip_missing: bool,
    division: str | None = None,
) -> ImageSet:
    """Splits, of which val is held out of train, and the record of what is missing."""
    fraction, seed, group = held_out
    if not 0 <= fraction < 1:
        raise ConfigurationError(f"val_fraction {fraction} must be 0 or more and below 1")
    rows = {split: without_duplicates(part, "video") for split, part in rows.items()}
    check_disjoint(rows, "video")
    paths = {row.path: place(row) for part in rows.values() for row in part}
    missing = {split: [row for row in part if not paths[row.path].exists()] for split, part in rows.items()}
    if not skip_missing and any(missing.values()):
        row = next(row for part in missing.values() for row in part)
        raise DataError(
            f"{sum(map(len, missing.values()))} videos of {name} are missing, the first being {paths[row.path]} "
            f"({row.where}); set skip_missing to leave them out"
        )
    lacking = {split: {row.path for row in part} for split, part in missing.items()}
    rows = {split: [row for row in part if row.path not in lacking[split]] for split, part in rows.items()}
    if fraction:
        rows = _held_out(rows["train"], fraction, seed, group) | {"test": rows["test"]}
    sources = {
        split: VideoFiles([paths[row.path] for row in part], [row.label for row in part])
        for split, part in rows.items()
    }
    about = {
        "dataset": name,
        "task": name,
        "trained_on": "train" if not fraction else f"train without {fraction:g} of each class, seed {seed}",
        "selected_on": "val" if fraction else None,
        "split": division,
        "missing_videos": {split: len(part) for split, part in missing.items()},
    }
    return video_set(sources, class_names, about)


def _held_out(rows: list[Row], fraction: float, seed: int, group: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Move whole groups of each class, in random order, to val until it has the share wanted; one group stays."""
    classes: dict[int, dict[str, list[Row]]] = {}
    for row in rows:
        classes.setdefault(row.label, {}).setdefault(group(row), []).append(row)
    chosen: set[str] = set()
    for label, groups in classes.items():
        names = sorted(groups)
        wanted, taken = round(fraction * sum(map(len, groups.values()))), 0
        for position in permutation(len(names), seed + label)[: len(names) - 1]:
            if taken >= wanted:
                break
            taken += len(groups[names[position]])
            chosen |= {row.path for row in groups[names[position]]}
    return {
        "train": [row for row in rows if row.path not in chosen],
        "val": [row for row in rows if row.path in chosen],
    }


def _videos_by_name(root: Path) -> dict[str, Path]:
    """Videos under a folder by their names without suffix; replacements win."""
    if not root.is_dir():
        raise DataError(f"video folder {root} does not exist")
    files = [path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS]
    files.sort(key=lambda path: (any("replacement" in part for part in path.parent.parts), path))
    return {path.stem: path for path in files}


def _first_file(root: Path, names: Iterable[str], what: str) -> Path:
    """The first of the files that exists, in the root or as named."""
    names = list(names)
    for file in [*(root / name for name in names), *(Path(name) for name in names)]:
        if file.is_file():
            return file
    raise DataError(f"the {what} are missing: expected {root / names[0]}")


def _first_folder(root: Path, names: Iterable[str]) -> Path:
    """The first of the folders that exists in the root, or the root."""
    if not root.is_dir():
        raise DataError(f"video folder {root} does not exist")
    return next((root / name for name in names if (root / name).is_dir()), root)


def _check_split(split: int) -> None:
    if split not in (1, 2, 3):
        raise ConfigurationError(f"split {split} must be 1, 2 or 3")
