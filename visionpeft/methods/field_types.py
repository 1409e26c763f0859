"""Whether the values of a method's fields are of the types that their annotations name."""

import math
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

WORDS = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a word", "words"),
    bool: ("True or False", "True or False"),
    NoneType: ("None", "None"),
}


def fits(value: object, annotation: object) -> bool:
    """Whether a value is of a type. A list may stand for a tuple and an integer for a number; numbers are finite.

    Every value fits an annotation that is not one of those of `in_words`.
    """
    parts = get_args(annotation)
    match get_origin(annotation) or annotation:
        case kind if kind in (Union, UnionType):
            return any(fits(value, part) for part in parts)
        case kind if kind is Literal:
            return isinstance(value, str) and value in parts
        case kind if kind in (list, tuple) and parts:
            fixed = kind is tuple and parts[-1] is not Ellipsis
            sized = isinstance(value, list | tuple) and (not fixed or len(value) == len(parts))
            return sized and all(fits(each, parts[0]) for each in value)
        case kind if kind is dict and parts:
            return isinstance(value, dict) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
        case kind if kind is int:
            return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
        case kind if kind is float:
            return fits(value, int) or (isinstance(value, float) and math.isfinite(value))
        case kind if kind in WORDS:
            return isinstance(value, kind)
    return True


def in_words(annotation: object) -> str:
    """A type in words: "an integer or None", "a list of words", "a list of 2 integers"."""
    parts = get_args(annotation)
    match get_origin(annotation) or annotation:
        case kind if kind in (Union, UnionType):
            return " or ".join(map(in_words, parts))
        case kind if kind is Literal:
            return " or ".join(map(repr, parts))
        case kind if kind in (list, tuple) and parts:
            count = f"{len(parts)} " if kind is tuple and parts[-1] is not Ellipsis else ""
            return f"a list of {count}{WORDS[parts[0]][1]}"
        case kind if kind is dict and parts:
            return f"a dictionary of {WORDS[parts[0]][1]} and {WORDS[parts[1]][1]}"
    return WORDS[annotation][0]
