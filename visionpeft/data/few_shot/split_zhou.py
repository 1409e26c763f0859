"""`split_zhou_*.json`, the split files of CoOp, and files of that layout which are labelled as our own."""

import json
from pathlib import Path

from visionpeft.data.annotations import read_json
from visionpeft.data.few_shot.place import Place, Splits, images_folder
from visionpeft.data.records import Row, check_disjoint
from visionpeft.errors import DataError

SPLITS = ("train", "val", "test")
PUBLISHED = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"


def read_split_zhou(key: str, definition: dict, place: Place, own: bool) -> Splits:
    """A data set whose split is a JSON file.

    Raises:
        DataError: the file is missing or malformed, an image is in two splits, or there is no image folder.
    """
    folder, file = _split_file(key, definition, place, own)
    images = images_folder(definition, place, folder)
    rows, names = _read_split_file(file)
    check_disjoint(rows)
    notes = []
    paths = [row.path for members in rows.values() for row in members]
    if len(set(paths)) < len(paths):
        notes.append(f"{len(paths) - len(set(paths))} images are listed more than once")
    return Splits(images, rows, names, "our own" if own else "published split_zhou", notes)


def own_split_file(definition: dict) -> str:
    """Name of the split file that is labelled as our own."""
    return f"split_visionpeft_{definition['title']}.json"


def _split_file(key: str, definition: dict, place: Place, own: bool) -> tuple[Path, Path]:
    """The data set's folder and its split file."""
    candidates = place.folders(definition)
    likely = next((f for f in candidates if any(i.is_dir() for i in place.images(definition, f))), candidates[0])
    if place.split_file is not None and not own:
        for file in (Path(place.split_file), likely / place.split_file):
            if file.is_file():
                return likely, file
        raise DataError(f"split file {place.split_file} does not exist, neither here nor in {likely}")
    name = own_split_file(definition) if own else definition["split_file"]
    for folder in candidates:
        if (folder / name).is_file():
            return folder, folder / name
    build = f"python -m visionpeft.prepare few_shot --dataset {key} --root {place.root}"
    if own:
        raise DataError(
            f"our own split of {definition['title']}, {likely / name}, does not exist; build it with {build}"
        )
    raise DataError(
        f"split file {likely / name} of {definition['title']} does not exist; the authors of CoOp publish it, see "
        f"{PUBLISHED} ({build} builds another one, labelled as our own, which split='own' reads)"
    )


def _read_split_file(file: Path) -> tuple[dict[str, list[Row]], list[str]]:
    """Rows of `{"train": [[path, label, class name], ...], "val": ..., "test": ...}`, and the class names."""
    content = read_json(file)
    if not isinstance(content, dict) or not all(isinstance(content.get(split), list) for split in SPLITS):
        raise DataError(f"split file {file} must be a JSON object with the lists train, val and test")
    names: dict[int, str] = {}
    rows: dict[str, list[Row]] = {}
    for split in SPLITS:
        rows[split] = []
        for number, entry in enumerate(content[split]):
            where = f"{file} {split} entry {number}"
            path, label, name = _checked(entry, where)
            if names.setdefault(label, name) != name:
                raise DataError(f"{where}: class {label} is called '{name}' here and '{names[label]}' before")
            rows[split].append(Row(path, label, where))
    if sorted(names) != list(range(len(names))):
        missing = min(set(range(max(names, default=0))) - names.keys(), default=0)
        raise DataError(f"split file {file} must number its classes from 0 without gaps; class {missing} is missing")
    return rows, [names[label].replace("_", " ") for label in range(len(names))]


def _checked(entry: object, where: str) -> tuple[str, int, str]:
    match entry:
        case [str(path), int(label), str(name)] if path and name.strip() and label >= 0 and not isinstance(label, bool):
            return path, label, name
    raise DataError(f"{where}: expected [path, label, class name], found {json.dumps(entry)}")
