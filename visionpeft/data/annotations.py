"""Annotation files: CSV and JSON lists of people's own images, VTAB-1k text lists, FGVC JSON files."""

import csv
import json
import re
from io import StringIO
from pathlib import Path

from visionpeft.data.labels import Read, one_class
from visionpeft.data.records import Row
from visionpeft.errors import DataError

# `int` does not read thousands of digits.
NUMBER = re.compile("[0-9]{1,18}")


def read_list(file: Path, read: Read = one_class) -> list[Row]:
    """Rows of a `.csv` or `.json` list, whose labels are read by `read`.

    CSV: a header naming the columns `path` and `label` (others are ignored), one image a line. JSON: an object
    `{path: label}`, or a list of `[path, label]` pairs or of objects with `path` and `label`.

    Raises:
        DataError: the file is missing, is of another kind, or has an entry without path or with a label that `read`
            refuses.
    """
    if file.suffix.lower() == ".csv":
        rows = _read_csv(file, read)
    elif file.suffix.lower() == ".json":
        rows = _read_json(file, read)
    else:
        raise DataError(f"image list {file} must be a .csv file with the header path,label or a .json file")
    if not rows:
        raise DataError(f"image list {file} holds no images")
    return rows


def read_json(file: Path) -> object:
    """Content of a JSON file; raises DataError when it is missing or is not JSON."""
    text = read_text(file)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON: {error}") from error


def read_text(file: Path) -> str:
    """Content of a UTF-8 file; raises DataError when it is missing or cannot be decoded."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read the list {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"the list {file} is not UTF-8 text") from error


def read_csv(file: Path) -> tuple[list[str], list[tuple[int, dict]]]:
    """Columns of a CSV file with a header, and its entries with their line numbers.

    Raises:
        DataError: the file is missing or is not CSV.
    """
    reader = csv.DictReader(StringIO(read_text(file), newline=""), skipinitialspace=True)
    try:
        return list(reader.fieldnames or ()), [(reader.line_num, entry) for entry in reader]
    except csv.Error as error:
        raise DataError(f"{file} after line {reader.line_num} is not CSV: {error}") from None


def read_split_lines(file: Path, classes: int) -> list[Row]:
    """Rows of a VTAB-1k list: each line a path and an integer label below `classes`; blank lines are ignored.

    Raises:
        DataError: the file is missing, or a line has no label, or a label out of range.
    """
    rows = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        path, _, label = line.strip().replace("\t", " ").rpartition(" ")
        if not path or not NUMBER.fullmatch(label):
            raise DataError(f"{where}: expected an image path and an integer label, found '{line.strip()}'")
        if int(label) >= classes:
            raise DataError(f"{where}: label {label} is out of range; the {classes} classes are 0 to {classes - 1}")
        rows.append(Row(path.strip(), int(label), where))
    return rows


def _read_csv(file: Path, read: Read) -> list[Row]:
    columns, entries = read_csv(file)
    if not {"path", "label"} <= set(columns):
        found = ",".join(columns) or "nothing"
        raise DataError(f"image list {file} must start with a header naming path and label, found '{found}'")
    for column in ("path", "label"):
        if columns.count(column) > 1:
            raise DataError(
                f"image list {file} has {columns.count(column)} columns {column}; leave the one that is meant"
            )
    for number, entry in entries:
        if any(cell.strip() for cell in entry.get(None, ())):
            raise DataError(
                f"{file} line {number} has more entries than the header; a label with commas in it must stand in quotes"
            )
    return [_row(entry["path"], entry["label"], f"{file} line {number}", read) for number, entry in entries]


def _read_json(file: Path, read: Read) -> list[Row]:
    content = read_json(file)
    if isinstance(content, dict):
        content = list(content.items())
    if not isinstance(content, list):
        raise DataError(f"image list {file} must be an object or a list, found {type(content).__name__}")
    rows = []
    for number, entry in enumerate(content, start=1):
        where = f"{file} entry {number}"
        if isinstance(entry, dict):
            entry = (entry.get("path"), entry.get("label"))
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise DataError(f"{where}: expected a path and a label, found {json.dumps(entry)}")
        rows.append(_row(*entry, where, read))
    return rows


def _row(path: object, label: object, where: str, read: Read) -> Row:
    if not isinstance(path, str) or not path.strip():
        raise DataError(f"{where} has no image path")
    try:
        return Row(path.strip(), read(label), where)
    except ValueError as error:
        raise DataError(f"{where}: image '{path}' {error}, found {label!r}") from None
