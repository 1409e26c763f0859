"""Lightning checkpoints on disk: written whole or not at all."""

import re
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from visionpeft.files import replacing
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.tasks.objective import Objective


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the old checkpoint, then replace it, so that a crash or a full disk leaves the old one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save to `path`."""
        with replacing(Path(path)) as partial:
            super().save_checkpoint(checkpoint, partial, storage_options)


class MovableCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which still knows its best epoch after the run directory was moved or renamed.

    Lightning records absolute paths, and forgets the scores of checkpoints that were written under another one: the
    first epoch after resuming would then count as the best, and overwrite the one that was.
    """

    @property
    def state_key(self) -> str:
        """That of ModelCheckpoint, under which earlier versions have written their state."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read the state of a checkpoint, whose files are those of the same names in the folder of this run."""
        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        here = {key: self._here(state_dict[key]) for key in paths}
        best = {self._here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | here | {"best_k_models": best, "dirpath": self.dirpath})

    def _here(self, path: str) -> str:
        # Not with pathlib: the run may come from a system with other separators.
        return str(Path(self.dirpath) / re.split(r"[\\/]", path)[-1]) if path else path


def checkpoint_callbacks(run: RunDirectory, has_validation: bool, objective: Objective) -> list[MovableCheckpoint]:
    """Keep the last epoch and, where there is a validation split, the best one by what the objective monitors."""
    here = {"dirpath": run.checkpoints, "enable_version_counter": False, "save_top_k": 1}
    callbacks = [MovableCheckpoint(filename="last", save_on_train_epoch_end=True, **here)]
    if has_validation:
        callbacks.append(
            MovableCheckpoint(
                filename="best",
                monitor=f"val/{objective.monitor}",
                mode=objective.mode,
                save_on_train_epoch_end=False,
                **here,
            )
        )
    return callbacks
