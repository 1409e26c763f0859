"""`python -m visionpeft.fit --config vtab_vpt.yaml`: train, test once, and leave everything in a run directory."""

import sys

from visionpeft.runs.command import command


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m visionpeft.fit`; returns the exit code."""
    return command("visionpeft.runs.fit:fit", arguments)


if __name__ == "__main__":
    sys.exit(main())
