"""`python -m visionpeft.predict RUN FILES...`: the most probable classes of image or video files."""

import sys

from visionpeft.runs.command import command


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m visionpeft.predict`; returns the exit code."""
    return command("visionpeft.runs.predict:predict", arguments)


if __name__ == "__main__":
    sys.exit(main())
