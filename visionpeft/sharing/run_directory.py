"""One folder for each run: configuration, environment, checkpoints, adapter, results and figures."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from visionpeft.errors import ConfigurationError, StorageError


def tested_images(results: dict) -> int | None:
    """How many images were tested by the contents of a results.json.

    One of an earlier version says only how many the split has, which may be None.
    """
    return results.get("tested_images", results["data"]["sizes"]["test"])


@dataclass(frozen=True)
class RunDirectory:
    """Where the files of a run are.

    Args:
        path: the folder.
    """

    path: Path

    @classmethod
    def create(cls, parent: Path, label: str) -> "RunDirectory":
        """Make `<parent>/<label>-<counter>` with the first free counter; two runs never get the same folder.

        Raises:
            ConfigurationError: no folder can be made there.
        """
        label = re.sub(r"[^\w.+-]+", "_", label)
        try:
            parent.mkdir(parents=True, exist_ok=True)
            return cls._first_free(parent, label)
        except OSError as error:
            raise ConfigurationError(
                f"no run directory can be made in {parent} ({error.strerror}); name another folder with --output"
            ) from None

    @classmethod
    def _first_free(cls, parent: Path, label: str) -> "RunDirectory":
        counter = 1
        while True:
            path = parent / f"{label}-{counter}"
            try:
                path.mkdir()  # fails if it exists: whoever makes it owns it
            except FileExistsError:
                counter += 1
            else:
                return cls(path)

    @classmethod
    def existing(cls, path: str | Path) -> "RunDirectory":
        """The folder of an earlier run.

        Raises:
            ConfigurationError: it is not the folder of a run.
        """
        run = cls(Path(path))
        if not run.config.is_file():
            raise ConfigurationError(f"{path} is not a run directory: it has no config.yaml")
        return run

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def data(self) -> Path:
        """By what the data are known again when the run is resumed."""
        return self.path / "data.json"

    @property
    def lock(self) -> Path:
        """Locked by the process that trains."""
        return self.path / ".lock"

    @property
    def metrics(self) -> Path:
        """One row for each epoch."""
        return self.path / "metrics.csv"

    @property
    def checkpoints(self) -> Path:
        """Lightning checkpoints of what is trained."""
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """The state after the last finished epoch, from which a run resumes."""
        return self.checkpoints / "last.ckpt"

    @property
    def best_checkpoint(self) -> Path:
        """The state after the epoch with the best validation accuracy, if there is a validation split."""
        return self.checkpoints / "best.ckpt"

    @property
    def holds_training(self) -> bool:
        """Whether something of its training is kept: an epoch of it or of a stage, or what it has learnt."""
        learnt = self.adapter.is_dir() or self.learner.is_dir()
        return learnt or next(self.path.rglob("*.ckpt"), None) is not None

    @property
    def adapter(self) -> Path:
        """The trained adapter of a run of image or video classification, as `visionpeft.load` reads it."""
        return self.path / "adapter"

    @property
    def carried(self) -> Path:
        """Copies of the saved adapters that its configuration names."""
        return self.path / "carried"

    @property
    def learner(self) -> Path:
        """The learner of a run of prompt learning, as `visionpeft.load_learner` reads it."""
        return self.path / "learner"

    @property
    def results(self) -> Path:
        """The numbers of the run."""
        return self.path / "results.json"

    @property
    def evaluation(self) -> Path:
        """The numbers of the latest `visionpeft.evaluate`."""
        return self.path / "evaluation.json"

    def read_results(self) -> dict:
        """The contents of results.json.

        Raises:
            StorageError: the run has not finished.
        """
        if not self.results.is_file() or not (self.adapter.is_dir() or self.learner.is_dir()):
            raise StorageError(
                f"{self.path} has no results: the run has not finished. Continue it with "
                f"python -m visionpeft.fit --resume {self.path}"
            )
        return json.loads(self.results.read_text())
