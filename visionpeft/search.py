"""`python -m visionpeft.search --space noah --budget 200`: which methods, of which size, in which blocks."""

import sys

from visionpeft.runs.command import command
from visionpeft.runs.launchers import be_alone


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m visionpeft.search`; returns the exit code."""
    return command("visionpeft.searching.command:run_search", arguments, of_several=be_alone)


if __name__ == "__main__":
    sys.exit(main())
