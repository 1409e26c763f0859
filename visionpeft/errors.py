"""Errors a user can act on. The command line prints their one sentence without a traceback and exits with code 2.

Also what such sentences are made of: the nearest valid names, the first line of another library's error.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Base of all errors whose message tells the user what was wrong, what is allowed and what to do."""


class UnsupportedError(UserError, TypeError):
    """A backbone, block or combination that a method or the mechanism refuses."""


class ConfigurationError(UserError, ValueError):
    """A name, target, block range or option that does not exist or matches nothing."""


class DataError(UserError, ValueError):
    """A data set, split file, image or label that cannot be used."""


class StorageError(UserError, ValueError):
    """An adapter folder that is damaged, or belongs to another backbone or method."""


def one_line(error: Exception) -> str:
    """The first line of what another library's error says, to be quoted in a sentence of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][:200].rstrip(" .")


def near(name: str, allowed: Iterable[str]) -> list[str]:
    """At most three allowed names that resemble a wrong one, first those of its letters, swapped or in capitals."""
    allowed = sorted(allowed)
    same = [other for other in allowed if other.lower() == name.lower()]
    same += [other for other in allowed if sorted(other.lower()) == sorted(name.lower())]
    return list(dict.fromkeys([*same, *difflib.get_close_matches(name, allowed, n=3, cutoff=0.6)]))[:3]


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The nearest allowed names separated by commas, or all if none is near."""
    allowed = sorted(allowed)
    return ", ".join(near(name, allowed) or allowed)


def near_names(name: str, allowed: Iterable[str]) -> str:
    """The part of a sentence that says what is near a wrong name: "; near names are X, Y", or nothing if none is."""
    found = near(name, allowed)
    return f"; near names are {', '.join(found)}" if found else ""


def advice(found: Iterable[str]) -> str:
    """The middle of a sentence about a wrong name, from those near it: "did you mean X or Y? ", or nothing."""
    found = list(found)
    return f"did you mean {' or '.join(found)}? " if found else ""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """The end of a sentence about a wrong name: "; did you mean X?", or all allowed names if none is near."""
    allowed = sorted(allowed)
    if found := near(name, allowed):
        return f"; {advice(found)}".rstrip()
    return f"; it can be {', '.join(allowed)}" if allowed else ""
