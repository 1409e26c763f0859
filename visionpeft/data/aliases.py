"""Published names of data sets and tasks with their aliases."""

from collections.abc import Mapping, Sequence

from visionpeft.errors import ConfigurationError, advice, near


def choose(name: str, aliases: Mapping[str, Sequence[str]], kind: str) -> str:
    """The valid name that `name` is or is an alias of, upper and lower case alike.

    Raises:
        ConfigurationError: there is none; names the nearest ones.
    """
    valid = {spelling.lower(): canonical for canonical, others in aliases.items() for spelling in (canonical, *others)}
    if name.lower() in valid:
        return valid[name.lower()]
    found = dict.fromkeys(valid[match] for match in near(name.lower(), valid))
    what_to_do = advice(found).rstrip() or f"choose one of {', '.join(aliases)}"
    raise ConfigurationError(f"unknown {kind} '{name}': {what_to_do}")
