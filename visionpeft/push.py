"""`python -m visionpeft.push RUN user/name`: put what a run has trained on the Hugging Face Hub."""

import sys

from visionpeft.runs.command import command


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m visionpeft.push`; returns the exit code."""
    return command("visionpeft.runs.push:push", arguments)


if __name__ == "__main__":
    sys.exit(main())
