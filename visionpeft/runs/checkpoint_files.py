"""Lightning checkpoints on disk: written whole or not at all."""

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


def checkpoint_callbacks(run: RunDirectory, has_validation: bool, objective: Objective) -> list[ModelCheckpoint]:
    """Keep the last epoch and, where there is a validation split, the best one by what the objective monitors."""
    here = {"dirpath": run.checkpoints, "enable_version_counter": False, "save_top_k": 1}
    callbacks = [ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **here)]
    if has_validation:
        callbacks.append(
            ModelCheckpoint(
                filename="best",
                monitor=f"val/{objective.monitor}",
                mode=objective.mode,
                save_on_train_epoch_end=False,
                **here,
            )
        )
    return callbacks
