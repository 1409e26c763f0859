"""Whether the values of a method's fields are of the types that their annotations name."""

import dataclasses
import math
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

import numpy as np

from visionpeft.errors import ConfigurationError

UNIONS = (Union, UnionType)
ONE = {int: "an integer", float: "a number", str: "a word", bool: "True or False", NoneType: "None", Path: "a path"}
MANY = {int: "integers", float: "numbers", str: "words"}


def as_python(value: object) -> object:
    """A value with Python's numbers in the place of NumPy's, which are the same, also in lists, tuples and dicts."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(as_python, value))
    if type(value) is dict:
        return {as_python(key): as_python(each) for key, each in value.items()}
    return value


def checked_field(owner: object, field: dataclasses.Field, kind: object) -> object:
    """The value of a field of a frozen dataclass, made as Python has it, there too, and checked.

    Args:
        owner: the dataclass.
        field: one of its fields.
        kind: the type that its value must have.

    Raises:
        ConfigurationError: it has another.
    """
    value = as_python(getattr(owner, field.name))
    object.__setattr__(owner, field.name, value)
    if not fits(value, kind):
        raise ConfigurationError(f"{type(owner).__name__}: {field.name} must be {in_words(kind)}, not {value!r}")
    return value


def fits(value: object, annotation: object) -> bool:
    """Whether a value is of a type. A list may stand for a tuple and an integer for a number; numbers are finite.

    Everything fits an annotation that is not built of the types in `ONE`, of `Literal`, list, tuple and dict.
    """
    kind, parts = get_origin(annotation) or annotation, get_args(annotation)
    if kind in UNIONS:
        return any(fits(value, part) for part in parts)
    if kind is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if kind in (list, tuple) and parts:
        if not isinstance(value, list | tuple):
            return False
        if _length(annotation) is None:
            return all(fits(each, parts[0]) for each in value)
        return len(value) == len(parts) and all(map(fits, value, parts))
    if kind is dict and parts:
        return isinstance(value, dict) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if kind is float:
        return fits(value, int) or (isinstance(value, float) and math.isfinite(value))
    return kind not in ONE or isinstance(value, kind)


def from_json(value: object, annotation: object) -> object:
    """A value that JSON has kept, which knows lists but no tuples, as its annotation wants it."""
    kind, parts = get_origin(annotation) or annotation, get_args(annotation)
    if kind in UNIONS:
        wanted = [from_json(value, part) for part in parts if fits(value, part)]
        return wanted[0] if wanted else value
    if kind in (list, tuple) and parts and isinstance(value, list):
        kinds = parts if kind is tuple and _length(annotation) is not None else (parts[0],) * len(value)
        if len(kinds) == len(value):
            return kind(from_json(each, part) for each, part in zip(value, kinds, strict=True))
    return value


def in_words(annotation: object) -> str:
    """A type in words, such as "an integer or None" or "a list of 2 integers"."""
    kind, parts = get_origin(annotation) or annotation, get_args(annotation)
    if kind in UNIONS:
        return " or ".join(map(in_words, parts))
    if kind is Literal:
        return " or ".join(map(repr, parts))
    if kind in (list, tuple) and parts:
        length = _length(annotation)
        if len(set(parts)) > 1 and length is not None:
            return "a list of " + ", ".join(map(in_words, parts))
        return f"a list of {'' if length is None else f'{length} '}{_many(parts[0])}"
    if kind is dict and parts:
        return f"a dictionary from {_many(parts[0])} to {_many(parts[1])}"
    return ONE.get(kind, str(annotation))


def _many(kind: object) -> str:
    return MANY.get(kind, str(kind))


def _length(annotation: object) -> int | None:
    """How many values a tuple has that has a fixed number of them."""
    parts = get_args(annotation)
    return len(parts) if get_origin(annotation) is tuple and parts[-1] is not Ellipsis else None
