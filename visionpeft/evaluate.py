"""`python -m visionpeft.evaluate RUN`: test what a finished run has trained again."""

import sys

from visionpeft.runs.command import command


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m visionpeft.evaluate`; returns the exit code."""
    return command("visionpeft.protocols.evaluate:evaluate", arguments)


if __name__ == "__main__":
    sys.exit(main())
