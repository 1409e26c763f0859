"""`python -m visionpeft.serve RUN_OR_FOLDER...`: an HTTP service of adapters and learners, in batches over all."""

import sys

from visionpeft.runs.command import command


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m visionpeft.serve`; returns the exit code."""
    return command("visionpeft.serving.command:serve", arguments)


if __name__ == "__main__":
    sys.exit(main())
