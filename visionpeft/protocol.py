"""`python -m visionpeft.protocol vtab1k --method LoRA ...`: a whole table of methods, or of learners on CLIP."""

import sys

from visionpeft.runs.command import command
from visionpeft.runs.launchers import be_alone


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m visionpeft.protocol`; returns the exit code."""
    return command("visionpeft.protocols.protocol:run_protocol", arguments, of_several=be_alone)


if __name__ == "__main__":
    sys.exit(main())
