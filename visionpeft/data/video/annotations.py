"""Annotation files of video data sets: Kinetics, Something-Something v2, HMDB51, UCF101 and `path label` lists."""

import re
from pathlib import Path

from visionpeft.data.annotations import read_csv, read_json, read_list, read_text
from visionpeft.data.records import Row
from visionpeft.errors import DataError

KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")
HMDB51_TRAIN, HMDB51_TEST = "1", "2"


def read_video_list(file: Path) -> list[Row]:
    """Rows of a list of videos.

    Lines `path label` or `path,label` with integer labels, as MMAction writes them (paths may hold spaces); or a CSV
    file with the header `path,label`, or JSON, as for images.

    Raises:
        DataError: the file is missing, empty, or has a line without path or label.
    """
    if file.suffix.lower() == ".json":
        return read_list(file)
    lines = _lines(file)
    if file.suffix.lower() == ".csv" and {"path", "label"} <= {part.strip() for part in lines[0][1].split(",")}:
        return read_list(file)
    rows = []
    for number, line in lines:
        match = re.fullmatch(r"(.*[^\s,])(?:\s*,\s*|\s+)([0-9]{1,18})", line)
        if match is None:
            raise DataError(f"{file} line {number}: expected a video path and an integer label, found '{line}'")
        rows.append(Row(match[1], int(match[2]), f"{file} line {number}"))
    return rows


def read_kinetics(file: Path) -> list[Row]:
    """Rows of a Kinetics CSV file; paths are names without suffix, `{youtube_id}_{time_start}_{time_end}`, six digits.

    Raises:
        DataError: the file is missing or empty, or lacks a column, a label or a time.
    """
    columns, entries = read_csv(file)
    missing = [column for column in KINETICS_COLUMNS if column not in columns]
    if missing:
        raise DataError(f"{file} lacks the column {missing[0]}; Kinetics has {','.join(KINETICS_COLUMNS)},split")
    rows = []
    for line, entry in entries:
        where = f"{file} line {line}"
        if not all(entry[column] for column in KINETICS_COLUMNS):
            raise DataError(f"{where} lacks an entry for one of {', '.join(KINETICS_COLUMNS)}")
        try:
            start, end = (int(float(entry[column])) for column in ("time_start", "time_end"))
        except (ValueError, OverflowError):
            raise DataError(
                f"{where}: times must be seconds, found {entry['time_start']} and {entry['time_end']}"
            ) from None
        rows.append(Row(f"{entry['youtube_id'].strip()}_{start:06d}_{end:06d}", entry["label"].strip(), where))
    if not rows:
        raise DataError(f"{file} holds no videos")
    return rows


def read_something(file: Path, class_names: list[str]) -> list[Row]:
    """Rows of a Something-Something v2 split: a JSON list of objects with `id` and `template`; paths are ids.

    The label is the template without its square brackets.

    Raises:
        DataError: the file is missing or malformed, or has a template that is not a class.
    """
    content = read_json(file)
    if not isinstance(content, list) or not content:
        raise DataError(f"{file} must be a JSON list of objects with id and template")
    index = {name: label for label, name in enumerate(class_names)}
    rows = []
    for number, entry in enumerate(content, start=1):
        where = f"{file} entry {number}"
        match entry:
            case {"id": str() | int() as name, "template": str(template)}:
                label = re.sub(r"[\[\]]", "", template)
            case _:
                raise DataError(f"{where}: expected an object with id and template")
        if label not in index:
            raise DataError(f"{where}: '{label}' is not among the {len(index)} classes of the label file")
        rows.append(Row(str(name), index[label], where))
    return rows


def read_something_classes(file: Path) -> list[str]:
    """Class names of Something-Something v2 in the order of their numbers: a JSON object `{name: "number"}`.

    Raises:
        DataError: the file is missing or malformed, or the numbers are not 0 to n - 1.
    """
    content = read_json(file)
    try:
        numbered = sorted((int(number), str(name)) for name, number in content.items())
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise DataError(f"{file} must be a JSON object of class names and numbers") from None
    if [number for number, _ in numbered] != list(range(len(numbered))):
        raise DataError(f"{file} must number its classes from 0 without gaps")
    return [name for _, name in numbered]


def read_hmdb51(folder: Path, split: int) -> tuple[dict[str, list[Row]], list[str]]:
    """Rows by split, and class names, of HMDB51: a file `<class>_test_split<n>.txt` for each class.

    Lines are a file name and 1 (train), 2 (test) or 0 (neither); paths become `<class>/<file name>`.

    Raises:
        DataError: there are no such files, or a line is malformed.
    """
    suffix = f"_test_split{split}.txt"
    files = sorted(folder.glob(f"*{suffix}"))
    if not files:
        raise DataError(f"{folder} holds no files <class>{suffix} of HMDB51")
    class_names = [file.name.removesuffix(suffix) for file in files]
    rows: dict[str, list[Row]] = {"train": [], "test": []}
    for label, file in enumerate(files):
        for number, line in _lines(file):
            name, _, use = line.rpartition(" ")
            if not name or use not in ("0", HMDB51_TRAIN, HMDB51_TEST):
                raise DataError(f"{file} line {number}: expected a file name and 0, 1 or 2, found '{line}'")
            if use != "0":
                row = Row(f"{class_names[label]}/{name.strip()}", label, f"{file} line {number}")
                rows["train" if use == HMDB51_TRAIN else "test"].append(row)
    return rows, class_names


def read_ucf101(folder: Path, split: int) -> tuple[dict[str, list[Row]], list[str]]:
    """Rows by split, and class names, of UCF101: `classInd.txt`, `trainlist0<n>.txt` and `testlist0<n>.txt`.

    Raises:
        DataError: a file is missing, or a line is malformed or names an unknown class.
    """
    numbered = []
    for number, line in _lines(folder / "classInd.txt"):
        position, _, name = line.partition(" ")
        if position != str(len(numbered) + 1) or not name:
            raise DataError(f"{folder / 'classInd.txt'} line {number}: expected class {len(numbered) + 1} and its name")
        numbered.append(name.strip())
    index = {name: label for label, name in enumerate(numbered)}
    rows: dict[str, list[Row]] = {}
    for part in ("train", "test"):
        file = folder / f"{part}list{split:02d}.txt"
        rows[part] = []
        for number, line in _lines(file):
            path = line.split()[0]
            name = path.partition("/")[0]
            if name not in index:
                raise DataError(f"{file} line {number}: class '{name}' is not in classInd.txt")
            rows[part].append(Row(path, index[name], f"{file} line {number}"))
    return rows, numbered


def _lines(file: Path) -> list[tuple[int, str]]:
    """Lines that are not blank, with their numbers; raises DataError when there are none."""
    lines = [(number, line.strip()) for number, line in enumerate(read_text(file).splitlines(), start=1)]
    lines = [(number, line) for number, line in lines if line]
    if not lines:
        raise DataError(f"{file} is empty")
    return lines
