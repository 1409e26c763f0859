"""What the label of an image says: one class, several labels at once, or a number."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch

from visionpeft.errors import ConfigurationError, DataError, did_you_mean

Labels = Literal["classes", "several", "number", "masks", "objects"]
# Those that are read from lists and names of folders; masks are images of their own, objects have files of theirs.
Written = Literal["classes", "several", "number"]
LABELS = get_args(Written)
# Below this share of their mean, differences between numbers are lost in float32, which has about seven digits.
RESOLVED = 1e-4
LARGEST = float(np.finfo(np.float32).max)

Read = Callable[[object], object]


def reader(labels: Labels, separator: str = ";") -> Read:
    """How a label is read as it is written: to an `int | str`, a tuple of them, or a `float`.

    What is returned raises ValueError with the reason for what is no such label.

    Args:
        labels: "classes", "several" or "number".
        separator: what stands between several labels in a text.

    Raises:
        ConfigurationError: another kind of labels, or an empty separator.
    """
    if labels not in LABELS:
        raise ConfigurationError(f"there are no labels {labels!r}{did_you_mean(str(labels), LABELS)}")
    if not separator.strip():
        raise ConfigurationError(f"separator {separator!r} must be a visible character that stands between labels")
    if labels == "several":
        return partial(several, separator=separator.strip())
    return number if labels == "number" else one_class_of_an_image


def one_class(label: object) -> int | str:
    """A class name, or an integer."""
    if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
        raise ValueError("needs a class name or an integer as label")
    label = str(label).strip()
    digits = label.removeprefix("-")
    # `int` does not read thousands of digits.
    return int(label) if digits.isascii() and digits.isdigit() and len(digits) <= 18 else label


def one_class_of_an_image(label: object) -> int | str:
    """As `one_class`; the reason names the option for what is no class."""
    try:
        return one_class(label)
    except ValueError as error:
        if isinstance(label, float):
            raise ValueError(f"{error} (a number to be learnt needs --data.labels number)") from None
        if isinstance(label, str | list):
            raise ValueError(f"{error} (several labels or none need --data.labels several)") from None
        raise


def several(label: object, separator: str) -> tuple[int | str, ...]:
    """Labels of an array, or of a text in which the separator stands between them, each once; none of an empty one.

    Zeros and ones for all labels that there are would be read as the labels 0 and 1; they show by coming repeatedly.
    """
    parts = label.split(separator) if isinstance(label, str) else label
    if isinstance(parts, int) and not isinstance(parts, bool):
        parts = [parts]
    if not isinstance(parts, list):
        raise ValueError(f"needs labels separated by '{separator}' or an array of them")
    found = [one_class(part) for part in parts if not (isinstance(part, str) and not part.strip())]
    if len(set(found)) < len(found) and set(found) <= {0, 1}:
        raise ValueError("needs the names or indices of the labels that apply, not a 0 or 1 for each that there is")
    return tuple(sorted(set(found), key=lambda part: (isinstance(part, str), part)))


def number(label: object) -> float:
    """A finite number."""
    if isinstance(label, bool) or not isinstance(label, str | int | float) or "_" in str(label):
        raise ValueError("needs a number as label")
    try:
        value = float(label)
    except (ValueError, OverflowError):
        raise ValueError("needs a number as label") from None
    if not abs(value) <= LARGEST:  # nor NaN
        raise ValueError("needs a finite number as label")
    return value


def parts_of(label: object) -> tuple:
    """The class names in a label of any kind but a number."""
    return label if isinstance(label, tuple) else (label,)


def in_words(label: object) -> str:
    """A label as it may be written."""
    return ";".join(map(str, label)) if isinstance(label, tuple) else str(label)


def as_tensor(labels: list, kind: Labels, num_classes: int) -> torch.Tensor:
    """The labels of a batch.

    Returns:
        Class indices int64 (batch,); for several labels float32 (batch, classes) of zeros and ones; for numbers float32
        (batch,).
    """
    if kind == "classes":
        return torch.tensor(labels)
    if kind == "number":
        return torch.tensor(labels, dtype=torch.float32)
    rows = torch.zeros(len(labels), num_classes)
    for row, present in zip(rows, labels, strict=True):
        row[list(present)] = 1.0
    return rows


def check_numbers(values: Sequence[float], split: str, kind: str) -> None:
    """Check that there is something to learn, or to measure, in the numbers of a split.

    Raises:
        DataError: they are all the same, or differ by less than float32 resolves.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.min() == numbers.max():
        use = "nothing can be learnt from them" if split == "train" else "R2 is not defined for them"
        raise DataError(
            f"the labels of all {len(numbers)} {kind}s of the {split} split are {numbers[0]:g}, and {use}; give "
            f"{kind}s with different numbers"
        )
    mean, deviation = moments(values)
    if split == "train" and deviation < RESOLVED * abs(mean):
        raise DataError(
            f"the labels of the {split} split differ by {deviation:.3g} around {mean:.9g}, which single precision does "
            f"not resolve; subtract {mean:.6g} from all of them"
        )


def moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (over n) of numbers."""
    numbers = np.asarray(values, dtype=np.float64)
    return float(numbers.mean()), float(numbers.std())


def class_counts(labels: Iterable, num_classes: int) -> list[int]:
    """How many images have each class, or each of several labels."""
    counts = np.zeros(num_classes, dtype=np.int64)
    for label in labels:
        counts[list(parts_of(label))] += 1
    return counts.tolist()
