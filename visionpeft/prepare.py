"""`python -m visionpeft.prepare vtab1k|fgvc|few_shot|backbone|statistics`: builds what data or a model lack."""

import sys

from visionpeft.runs.command import command


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m visionpeft.prepare`; returns the exit code."""
    return command("visionpeft.data.preparation.prepare:prepare", arguments)


if __name__ == "__main__":
    sys.exit(main())
