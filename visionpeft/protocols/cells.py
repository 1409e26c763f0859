"""A cell of a table: one training run, which is made once, resumed if it was interrupted, and never made again."""

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from visionpeft.errors import ConfigurationError, StorageError
from visionpeft.files import write_json
from visionpeft.protocols import work
from visionpeft.protocols.further_arguments import decided_by_protocol, overlays_of
from visionpeft.protocols.learner_candidates import LearnerCandidate, on
from visionpeft.runs.config_files import config_content, config_name
from visionpeft.runs.fit import fit
from visionpeft.sharing.run_directory import RunDirectory


@dataclass(frozen=True)
class Training:
    """A training run in a folder of its own.

    Args:
        name: of the folder.
        text: what is trained, in words.
        arguments: command line of `visionpeft.fit`.
        about: what a table needs to know of it besides its results.
    """

    name: str
    text: str
    arguments: tuple[str, ...]
    about: dict = field(default_factory=dict)

    def done(self, folder: Path) -> bool:
        """Whether it has results."""
        run = find_run(folder)
        return run is not None and run.results.is_file()

    def do(self, folder: Path) -> None:
        """Train, or resume what was interrupted.

        Raises:
            StorageError: the training left no results.
        """
        begun = find_run(folder)
        if begun is None:
            write_json(folder / "cell.json", self.settings() | {"about": self.about})
            fit([*self.arguments, "--output", str(folder)])
        else:
            fit(["--resume", str(begun.path)])
        if not Training.done(self, folder):
            raise StorageError(f"the run of {self.text} left no results in {folder}")

    def settings(self) -> dict:
        """The command line, and hashes of what the configurations it names say."""
        following = [*self.arguments[1:], ""]
        configs = [
            argument.partition("=")[2] or value
            for argument, value in zip(self.arguments, following, strict=True)
            if argument.partition("=")[0] in ("--config", "-c")
        ]
        return {"arguments": list(self.arguments), "configurations": {config: _hash(config) for config in configs}}

    def check(self, folder: Path) -> None:
        """Refuse a folder that was made with other settings.

        Raises:
            ConfigurationError: it was.
        """
        file = folder / "cell.json"
        if not file.is_file():
            return
        made, wanted = json.loads(file.read_text()), self.settings()
        if all(made[key] == wanted[key] for key in wanted):
            return
        change = f"{' '.join(made['arguments'])}, not {' '.join(wanted['arguments'])}"
        if made["arguments"] == wanted["arguments"]:
            change = "a configuration that has changed since"
        raise ConfigurationError(f"{folder} was made with {change}; give another --output, or delete that folder")


def _hash(config: str) -> str:
    """Of the content, whatever its comments say."""
    content = config_content(config)
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Cell:
    """A learner trained on a few-shot data set.

    Args:
        learner: what is trained.
        dataset: on which data set,
        classes: on which of its classes: "all" or "base",
        shots: with how many images of each class,
        seed: drawn with which seed, which is also that of the training.
    """

    learner: LearnerCandidate
    dataset: str
    classes: str
    shots: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        stem = Path(config_name(self.learner.config)).name
        return f"{stem}-{self.dataset}-{self.classes}-{self.shots}-shots-seed-{self.seed}"

    @property
    def text(self) -> str:
        """The cell in words."""
        shots = f"{self.shots} shot{'' if self.shots == 1 else 's'}"
        return f"{self.learner.name} on {self.classes} classes of {self.dataset}, {shots}, seed {self.seed}"

    def arguments(self, given: Sequence[str]) -> list[str]:
        """Command line of `visionpeft.fit` that trains it."""
        configs = [self.learner.config, *overlays_of(given)]
        return [
            *("--config", self.learner.config, *given, *on(self.dataset, self.classes)),
            *decided_by_protocol(configs, {"report": "last", "test": "true"}),
            *("--data.shots", str(self.shots), "--data.seed", str(self.seed), "--seed_everything", str(self.seed)),
        ]


def plan(
    learners: Sequence[LearnerCandidate],
    datasets: Sequence[str],
    classes: str,
    shots: Sequence[int],
    seeds: Sequence[int],
) -> list[Cell]:
    """All cells in order. A learner that uses no training images has 0 shots only, one without chance a single seed."""
    return [
        Cell(learner, dataset, classes, number, seed)
        for dataset in datasets
        for learner in learners
        for number in (shots if learner.uses_images else [0])
        for seed in (seeds if learner.uses_chance else seeds[:1])
    ]


def finish(
    cells: Sequence[Cell], given: Sequence[str], output: Path, workers: work.Workers = 1
) -> list[tuple[Cell, RunDirectory]]:
    """Train what is not finished yet; returns the run of each cell.

    Raises:
        ConfigurationError: `output` holds a cell that was trained with other settings.
    """
    trainings = [Training(cell.name, cell.text, tuple(cell.arguments(given))) for cell in cells]
    train(trainings, output, workers)
    return [(cell, find_run(output / cell.name)) for cell in cells]


def train(trainings: Sequence[Training], output: Path, workers: work.Workers = 1) -> None:
    """Train what is not finished yet.

    Raises:
        ConfigurationError: `output` holds one that was made with other settings.
    """
    for training in trainings:
        training.check(output / training.name)
    work.finish(trainings, output, workers)


def settle(output: Path, name: str, settings: dict) -> None:
    """Write what all cells of a folder are made with, or refuse one that was made with something else.

    Args:
        output: the folder.
        name: of the file.
        settings: plain values.

    Raises:
        ConfigurationError: it was.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = output / name
    own = output / f".{file.stem}.{secrets.token_hex(8)}.json"
    write_json(own, settings)
    try:
        os.link(own, file)  # fails if it exists: whoever comes first decides
    except FileExistsError:
        made = json.loads(file.read_text())
        differing = [key for key in settings if made.get(key) != settings[key]]
        if differing:
            change = "; ".join(f"{key} {made.get(key)}, not {settings[key]}" for key in differing)
            raise ConfigurationError(f"{output} was made with {change}; give another --output") from None
    finally:
        own.unlink()


def find_run(folder: Path) -> RunDirectory | None:
    """The run in the folder of a cell that has finished, or else the one that has begun."""
    begun = [RunDirectory(path.parent) for path in sorted(folder.glob("*/config.yaml"))]
    finished = [run for run in begun if run.results.is_file()]
    return next(iter([*finished, *begun]), None)
