"""Which classes the labels of rows name, and whether they name classes at all."""

from collections.abc import Iterable, Sequence

from visionpeft.data.labels import Labels, number, one_class, parts_of
from visionpeft.data.records import Row
from visionpeft.errors import ConfigurationError, DataError

SEPARATORS = (";", "|")  # a comma is part of many names of classes


def indexed(rows: Sequence[Row], labels: Labels, class_names: Sequence[str] | None) -> tuple[list[str], list]:
    """Class names, and the label of each row as it is learnt: a class index, a tuple of them, or a number.

    Args:
        rows: with their labels as read.
        labels: what they say.
        class_names: names in the order of the indices; those found, sorted, when absent. Numbers have none.

    Raises:
        ConfigurationError: class names of numbers.
        DataError: names and integers are mixed, or a label is not among `class_names`.
    """
    if labels == "number":
        if class_names is not None:
            raise ConfigurationError("class_names name classes; labels number has none, so leave them out")
        return [], [row.label for row in rows]
    names, index = _class_index(rows, class_names)
    if labels == "classes":
        return names, [index[row.label] for row in rows]
    return names, [tuple(sorted({index[part] for part in row.label})) for row in rows]


def _class_index(rows: Sequence[Row], class_names: Sequence[str] | None) -> tuple[list[str], dict[int | str, int]]:
    """Class names, and the class index of each label as written: a name, or an integer."""
    found = {part: row for row in reversed(rows) for part in parts_of(row.label)}  # with the first row that has it
    if class_names is None:
        numbered = [part for part in found if isinstance(part, int)]
        if numbered and len(numbered) != len(found):
            row, part = next((row, part) for row in rows for part in parts_of(row.label) if isinstance(part, int))
            raise DataError(f"{row.where}: label {part} is an integer while other labels are names; use one kind")
        ordered = sorted(found)
        return [str(part) for part in ordered], {part: position for position, part in enumerate(ordered)}
    names = list(class_names)
    index = positions(names)
    for row in rows:
        for part in parts_of(row.label):
            if part not in index:
                raise out_of_range(part, row.where, names)
    return names, index


def check_numbers(rows: Sequence[Row], class_names: Sequence[str]) -> None:
    """Refuse integers that are the name of one class and the index of another.

    Args:
        rows: with labels of a list, in which an integer may be either.
        class_names: names in the order of the indices.

    Raises:
        DataError: there is such a label.
    """
    named = {one_class(name): position for position, name in enumerate(class_names) if str(name).strip()}
    for row in rows:
        for part in parts_of(row.label):
            if isinstance(part, int) and 0 <= part < len(class_names) and named.get(part, part) != part:
                raise DataError(
                    f"{row.where}: label {part} is the name of class {named[part]} and the index of class "
                    f"'{class_names[part]}'; leave class_names out, so that labels are names, or list names that are "
                    "no numbers, so that they are indices"
                )


def positions(names: Sequence[str]) -> dict[int | str, int]:
    """The class index of each label as it may be written: a name, or the index itself."""
    index: dict[int | str, int] = {position: position for position in range(len(names))}
    index.update({name: position for position, name in enumerate(names)})
    return index


def out_of_range(label: int | str, where: str, names: Sequence[str]) -> DataError:
    """The error about a label that is none of the classes.

    Args:
        label: as read.
        where: what messages call the place where it stands.
        names: of the classes.
    """
    known = f"0 to {len(names) - 1}" if isinstance(label, int) else ", ".join(names[:10])
    return DataError(f"{where}: label '{label}' is out of range; class_names allows {known}")


def otherwise(rows: Iterable[Row]) -> tuple[Labels, Row] | None:
    """What labels that are read as classes seem to be instead, and a row that shows it; None where they seem classes.

    Numbers: every label is one, and not all are whole. Several: every part of a label with a `SEPARATORS` in it is also
    found in another label; a name such as "tench; Tinca tinca" has its parts for itself.
    """
    first = {row.label: row for row in reversed(list(rows))}
    values = {label: _value(label) for label in first}
    if all(value is not None for value in values.values()):
        fractions = [label for label, value in values.items() if not value.is_integer()]
        return ("number", first[fractions[0]]) if fractions else None
    for separator in SEPARATORS:
        split = {label: set(map(str.strip, str(label).split(separator))) - {""} for label in first}
        counts: dict[str, int] = {}
        for parts in split.values():
            for part in parts:
                counts[part] = counts.get(part, 0) + 1
        for label, parts in split.items():
            if len(parts) > 1 and all(counts[part] > 1 for part in parts):
                return "several", first[label]
    return None


def _value(label: int | str) -> float | None:
    try:
        return number(label)
    except ValueError:
        return None


def check_classes(rows: Sequence[Row], kind: str) -> None:
    """Refuse labels that would become class names and seem to be something else.

    Args:
        rows: with labels read as classes.
        kind: what they label, "image" or "video".

    Raises:
        DataError: they are numbers, or several labels each.
    """
    if (seen := otherwise(rows)) is None:
        return
    labels, row = seen
    meant = {
        "number": "all labels are numbers and not all of them whole",
        "several": "the parts of this label are labels of others, too",
    }[labels]
    option = f"set --data.labels {labels}" if kind == "image" else f"{kind}s can only be told apart by one class each"
    raise DataError(
        f"{row.where}: label '{row.label}' would become the name of a class, but {meant}: {option}, or, if these are "
        "names of classes, list them with --data.class_names"
    )
