"""A VTAB-1k task in the layout of the community archive: lists of lossless images for each split."""

import shutil
from pathlib import Path

from visionpeft.data.aliases import choose
from visionpeft.data.preparation.download import Archive, published_archives
from visionpeft.data.preparation.staging import prepare_folder
from visionpeft.data.preparation.vtab_sources import divide
from visionpeft.data.records import ImageFiles, Source
from visionpeft.data.vtab import vtab1k_tasks
from visionpeft.errors import DataError


def prepare_vtab1k(
    task: str, root: Path, seed: int = 0, given: Path | None = None, mirror: str | None = None
) -> tuple[Path, dict]:
    """Build `root/<task>`.

    Args:
        task: its name or an alias.
        root: folder of the task folders.
        seed: of the draws.
        given: a folder that may have the archives.
        mirror: address of a folder with the archives.

    Returns:
        The folder, and what is recorded in it.

    Raises:
        ConfigurationError: an unknown task.
        DataError: a task that cannot be built here, or what `prepare_folder` refuses.
    """
    tasks = vtab1k_tasks()
    task = choose(task, {name: entry["aliases"] for name, entry in tasks.items()}, "VTAB-1k task")
    published = published_archives()
    if task in published["refused"]:
        raise DataError(f"{task} is not built here: {published['refused'][task]}")
    classes = tasks[task]["classes"]

    def write(unpacked: Path, folder: Path) -> dict:
        division = divide(task, unpacked, seed)
        splits = {"train800": division.train800, "val200": division.val200, "test": division.test}
        left_out, lists = [], {}
        for split, source in splits.items():
            if max(source.labels) >= classes:
                raise DataError(f"{task} has {classes} classes, and the archive an image of class {max(source.labels)}")
            print(f"writing {len(source):,} images of {split}", flush=True)
            lists[split] = _write_split(folder, split, source, left_out)
        lists["train800val200"] = lists["train800"] + lists["val200"]
        for split, rows in lists.items():
            (folder / f"{split}.txt").write_text("".join(f"{path} {label}\n" for path, label in rows))
        return {
            "dataset": "VTAB-1k",
            "task": task,
            "split": "own",
            "rule": f"{division.rule}, seed {seed}",
            "official_test": division.official_test,
            "seed": seed,
            "left_out": left_out,
        }

    archives = [Archive(**entry) for entry in published["vtab1k"][task]]
    return root / task, prepare_folder(root / task, archives, write, given, mirror)


def _write_split(folder: Path, split: str, source: Source, left_out: list[str]) -> list[tuple[str, int]]:
    """Published image files as they are, others as PNG; damaged ones are left out and named."""
    (folder / "images" / split).mkdir(parents=True)
    rows = []
    for index, label in enumerate(source.labels):
        try:
            image = source.image(index)
        except DataError:
            left_out.append(f"{split}: {Path(source.name(index)).name}")
            continue
        is_file = isinstance(source, ImageFiles)
        suffix = source.paths[index].suffix.lower() if is_file else ".png"
        path = f"images/{split}/{index:06d}{suffix}"
        if is_file:
            shutil.copyfile(source.paths[index], folder / path)
        else:
            image.save(folder / path)
        rows.append((path, label))
    return rows
