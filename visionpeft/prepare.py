"""`python -m visionpeft.prepare few_shot`: builds a split of a few-shot data set from what is on disk."""

import argparse
import sys
from pathlib import Path

from visionpeft.cli import command
from visionpeft.data.annotations import write_json
from visionpeft.data.few_shot_definitions import few_shot_datasets, find_few_shot
from visionpeft.data.few_shot_place import Place
from visionpeft.data.own_splits import build_split
from visionpeft.errors import ConfigurationError, DataError


def prepare(arguments: list[str]) -> None:
    """Build the split file that was asked for, and say where it is."""
    options = _parse(arguments)
    key = find_few_shot(options.dataset)
    place = Place(options.root, options.folder, options.image_folder)
    file, content = build_split(key, few_shot_datasets()[key], place, options.seed)
    if file.exists():
        raise DataError(f"{file} exists; remove it to build the split again")
    write_json(file, content)
    sizes = ", ".join(f"{len(content[split]):,} {split}" for split in ("train", "val", "test"))
    print(f"{sizes} images listed in {file}")
    print(f"this split is our own, not the published one; read it with --data.dataset {key} --data.split own")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m visionpeft.prepare", description="Build what a data set lacks.")
    what = parser.add_subparsers(dest="what", required=True, metavar="few_shot")
    few_shot = what.add_parser("few_shot", help="a train/val/test split of a set of the few-shot benchmark")
    few_shot.add_argument("--dataset", required=True, help="such as eurosat")
    few_shot.add_argument(
        "--root", type=Path, required=True, help="folder in which the data sets lie, or this one's own"
    )
    few_shot.add_argument("--folder", help="the data set's folder in the root, in place of the usual names")
    few_shot.add_argument("--image-folder", help="folder of the images in that, in place of the usual ones")
    few_shot.add_argument("--seed", type=int, default=1, help="of the division (1)")

    def refuse(message: str):
        raise ConfigurationError(f"{message}; see python -m visionpeft.prepare few_shot --help")

    parser.error = few_shot.error = refuse
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m visionpeft.prepare`; returns the exit code."""
    return command(prepare, arguments)


if __name__ == "__main__":
    sys.exit(main())
