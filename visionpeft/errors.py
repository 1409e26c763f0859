"""Errors a user can act on. The command line prints their one sentence without a traceback and exits with code 2."""


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
