"""What a training leaves that ends by an error: nothing, or epochs and the command that goes on with them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from visionpeft.errors import DataError, UserError
from visionpeft.runs.command import PeerLost
from visionpeft.runs.processes import TrainingEnded
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.tasks.checkpointing import DivergedError

# What is in a run directory before its first epoch is over.
FILES = ("config.yaml", "data.json", "environment.json", "draw.json", "metrics.csv", ".lock")
FOLDERS = ("carried", "tensorboard", "checkpoints", "stages")


@contextmanager
def nothing_half_written(run: RunDirectory, new: bool) -> Iterator[None]:
    """Remove what was written of a run that ends by an error of the user's before an epoch of it is finished.

    A training that diverged stays, to be looked at. So does that of several processes: how far they came is not known.

    Args:
        run: its directory.
        new: whether this process has made it.
    """
    try:
        yield
    except (UserError, MisconfigurationException) as error:
        if new and not run.holds_training and not isinstance(error, PeerLost | TrainingEnded | DivergedError):
            for name in FILES:
                (run.path / name).unlink(missing_ok=True)
            for name in FOLDERS:
                shutil.rmtree(run.path / name, ignore_errors=True)
            with suppress(OSError):  # there is something of somebody else's in it
                run.path.rmdir()
        raise


@contextmanager
def how_to_go_on(run: RunDirectory) -> Iterator[None]:
    """Say how a run goes on after damaged data or after it has diverged, if something of its training is kept.

    Raises:
        DataError: what was wrong, and the command.
        DivergedError: the same.
    """
    try:
        yield
    except (DataError, DivergedError) as error:
        if not run.holds_training:
            raise
        damaged = isinstance(error, DataError)
        option = "--data.skip_corrupt true" if damaged else "--model.optimisation.lr ..."
        how = "without what is damaged" if damaged else "with another rate, from the last finished epoch"
        raise type(error)(
            f"{error}; what was trained is kept, and python -m visionpeft.fit --resume {run.path} {option} goes on "
            f"{how}"
        ) from error
