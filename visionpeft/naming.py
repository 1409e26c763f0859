"""The nearest valid names, for errors about a wrong one."""

import difflib
from collections.abc import Iterable


def near(name: str, allowed: Iterable[str]) -> list[str]:
    """At most three allowed names that resemble a wrong one, first those that differ in capitals only."""
    allowed = sorted(allowed)
    same = [other for other in allowed if other.lower() == name.lower()]
    return list(dict.fromkeys([*same, *difflib.get_close_matches(name, allowed, n=3, cutoff=0.6)]))[:3]


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The nearest allowed names separated by commas, or all if none is near."""
    allowed = sorted(allowed)
    return ", ".join(near(name, allowed) or allowed)


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """The end of a sentence about a wrong name: "; did you mean X?", or all allowed names if none is near."""
    allowed = sorted(allowed)
    if found := near(name, allowed):
        return f"; did you mean {' or '.join(found)}?"
    return f"; it can be {', '.join(allowed)}" if allowed else ""
