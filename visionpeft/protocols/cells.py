"""A cell of a table: one training run, which is made once, resumed if it was interrupted, and never made again."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from visionpeft.cli import find_config
from visionpeft.errors import ConfigurationError, StorageError
from visionpeft.fit import fit
from visionpeft.protocols.candidates import Candidate, on
from visionpeft.run_directory import RunDirectory, write_json


@dataclass(frozen=True)
class Cell:
    """A training run.

    Args:
        learner: what is trained.
        dataset: on which data set,
        classes: on which of its classes: "all" or "base",
        shots: with how many images of each class,
        seed: drawn with which seed, which is also that of the training.
    """

    learner: Candidate
    dataset: str
    classes: str
    shots: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        stem = Path(self.learner.config).stem
        return f"{stem}-{self.dataset}-{self.classes}-{self.shots}-shots-seed-{self.seed}"

    @property
    def text(self) -> str:
        """The cell in words."""
        shots = f"{self.shots} shot{'' if self.shots == 1 else 's'}"
        return f"{self.learner.name} on {self.classes} classes of {self.dataset}, {shots}, seed {self.seed}"

    def arguments(self, given: Sequence[str]) -> list[str]:
        """Command line of `visionpeft.fit` that trains it."""
        return [
            *("--config", self.learner.config, *given, *on(self.dataset, self.classes)),
            *("--data.shots", str(self.shots), "--data.seed", str(self.seed), "--seed_everything", str(self.seed)),
        ]


def plan(
    learners: Sequence[Candidate], datasets: Sequence[str], classes: str, shots: Sequence[int], seeds: Sequence[int]
) -> list[Cell]:
    """All cells in order. A learner that uses no training images has 0 shots only, one without chance a single seed."""
    return [
        Cell(learner, dataset, classes, number, seed)
        for dataset in datasets
        for learner in learners
        for number in (shots if learner.uses_images else [0])
        for seed in (seeds if learner.uses_chance else seeds[:1])
    ]


def finish(cells: Sequence[Cell], given: Sequence[str], output: Path) -> list[tuple[Cell, RunDirectory]]:
    """Train what is not finished yet, one cell after the other.

    Raises:
        ConfigurationError: `output` holds a cell that was trained with other settings.
    """
    for cell in cells:
        _check_settings(cell, given, output)
    finished = []
    for number, cell in enumerate(cells, start=1):
        made = f"cell {number} of {len(cells)}: {cell.text}"
        run = _find(output / cell.name)
        if run is None or not run.results.is_file():
            Console().print(f"[bold]{made}[/bold]", highlight=False, soft_wrap=True)
            run = _train(cell, run, given, output / cell.name)
        else:
            Console().print(f"{made}: finished before", highlight=False, soft_wrap=True)
        finished.append((cell, run))
    return finished


def _train(cell: Cell, begun: RunDirectory | None, given: Sequence[str], folder: Path) -> RunDirectory:
    if begun is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "cell.json", _settings(cell, given))
        fit([*cell.arguments(given), "--output", str(folder)])
    else:
        fit(["--resume", str(begun.path)])
    run = _find(folder)
    if run is None or not run.results.is_file():
        raise StorageError(f"the run of {cell.text} left no results in {folder}")
    return run


def _find(folder: Path) -> RunDirectory | None:
    """The run of a cell that has finished, or else the one that has begun."""
    begun = [RunDirectory(path.parent) for path in sorted(folder.glob("*/config.yaml"))]
    finished = [run for run in begun if run.results.is_file()]
    return next(iter([*finished, *begun]), None)


def _settings(cell: Cell, given: Sequence[str]) -> dict:
    """The command line, and hashes of the configurations it names."""
    arguments = cell.arguments(given)
    configs = [
        argument.partition("=")[2] or following
        for argument, following in zip(arguments, [*arguments[1:], ""], strict=True)
        if argument.partition("=")[0] in ("--config", "-c")
    ]
    hashes = {config: hashlib.sha256(find_config(config).read_bytes()).hexdigest() for config in configs}
    return {"arguments": arguments, "configurations": hashes}


def _check_settings(cell: Cell, given: Sequence[str], output: Path) -> None:
    file = output / cell.name / "cell.json"
    if not file.is_file():
        return
    made, wanted = json.loads(file.read_text()), _settings(cell, given)
    if made == wanted:
        return
    change = f"{' '.join(made['arguments'])}, not {' '.join(wanted['arguments'])}"
    if made["arguments"] == wanted["arguments"]:
        change = "a configuration that has changed since"
    raise ConfigurationError(f"{file.parent} was made with {change}; give another --output, or delete that folder")
