"""`python -m visionpeft.fit --config vtab_vpt.yaml`: train, test once, and leave everything in a run directory."""

import sys

from visionpeft.runs.command import command
from visionpeft.runs.launchers import train_as_one
from visionpeft.runs.options import answer_at_once


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m visionpeft.fit`; returns the exit code."""
    return command("visionpeft.runs.fit:fit", arguments, answer_at_once, train_as_one)


if __name__ == "__main__":
    sys.exit(main())
