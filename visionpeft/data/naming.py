"""Names that people type: published aliases, and the nearest valid name in an error."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from visionpeft.errors import ConfigurationError


def choose(name: str, aliases: Mapping[str, Sequence[str]], kind: str) -> str:
    """The valid name that `name` is or is an alias of, upper and lower case alike.

    Raises:
        ConfigurationError: there is none; names the nearest ones.
    """
    valid = {spelling.lower(): canonical for canonical, others in aliases.items() for spelling in (canonical, *others)}
    if name.lower() in valid:
        return valid[name.lower()]
    near = dict.fromkeys(valid[match] for match in get_close_matches(name.lower(), valid, n=3))
    advice = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(aliases)}"
    raise ConfigurationError(f"unknown {kind} '{name}': {advice}")
