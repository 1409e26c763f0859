"""What a training leaves that ends by an error: nothing, or epochs and the command that goes on with them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from visionpeft.errors import DataError, UserError
from visionpeft.runs.command import PeerLost
from visionpeft.runs.processes import TrainingEnded
from visionpeft.sharing.run_directory import RunDirectory

# What is in a run directory before its first epoch is over.
FILES = ("config.yaml", "data.json", "environment.json", "draw.json", "metrics.csv", ".lock")
FOLDERS = ("carried", "tensorboard", "checkpoints", "stages")


@contextmanager
def nothing_half_written(run: RunDirectory, new: bool) -> Iterator[None]:
    """Remove what was written of a run that ends by an error of the user's before an epoch of it is finished.

    Of several processes this one cannot know how far they came, and their run stays.

    Args:
        run: its directory.
        new: whether this process has made it.
    """
    try:
        yield
    except (UserError, MisconfigurationException) as error:
        if new and not run.has_checkpoint and not isinstance(error, PeerLost | TrainingEnded):
            for name in FILES:
                (run.path / name).unlink(missing_ok=True)
            for name in FOLDERS:
                shutil.rmtree(run.path / name, ignore_errors=True)
            with suppress(OSError):  # there is something of somebody else's in it
                run.path.rmdir()
        raise


@contextmanager
def how_to_go_on(run: RunDirectory) -> Iterator[None]:
    """Say after an error of the data how the run goes on without it, if epochs of it are kept.

    Raises:
        DataError: what was wrong, and the command.
    """
    try:
        yield
    except DataError as error:
        if not run.has_checkpoint:
            raise
        raise DataError(
            f"{error}; finished epochs are kept, and python -m visionpeft.fit --resume {run.path} --data.skip_corrupt "
            "true goes on without what is damaged"
        ) from error
