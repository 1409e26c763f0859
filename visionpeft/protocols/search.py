"""Hyper-parameters chosen on the validation split: from the whole grid, or by Optuna with a budget."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visionpeft.errors import ConfigurationError
from visionpeft.files import write_json
from visionpeft.protocols.method_candidates import MethodCandidate
from visionpeft.protocols.method_runs import LR, Benchmark, Chosen, Trial
from visionpeft.protocols.work import work_through

STARTUP_TRIALS = 10


def grid_points(grid: Mapping[str, Sequence]) -> list[dict[str, object]]:
    """Every combination of the values."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def best(trials: Sequence[tuple[Mapping[str, object], float]]) -> tuple[Mapping[str, object], float]:
    """Values of highest accuracy; of equal ones those with the smallest learning rate, then the first.

    Args:
        trials: values and accuracy on the validation split, below 0 where training diverged.

    Raises:
        ConfigurationError: all trainings diverged.
    """
    values, score = min(trials, key=lambda trial: (-trial[1], trial[0].get(LR, 0.0)))
    if score < 0:
        raise ConfigurationError(
            f"all {len(trials)} trials diverged; give smaller learning rates in a recipe of your own"
        )
    return values, score


@dataclass(frozen=True)
class OptunaStudy:
    """A study of one method on one task, whose trials follow one another.

    The study is `study.db` in its folder. What is tried next depends on the finished trials alone, so an interrupted
    study goes on as if it had not been.

    Args:
        benchmark: how trials are trained.
        candidate: the method.
        task: the task.
        budget: number of trials.
        seed: of trainings and sampler.
    """

    benchmark: Benchmark
    candidate: MethodCandidate
    task: str
    budget: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"search/{self.candidate.name}-{self.task}-seed-{self.seed}/optuna"

    @property
    def text(self) -> str:
        """The study in words."""
        return f"{self.candidate.name} on {self.task}, study of {self.budget} trials"

    def done(self, folder: Path) -> bool:
        """Whether the budget is spent."""
        return len(self.trials(folder)) >= self.budget

    def trials(self, folder: Path) -> list[tuple[dict, float]]:
        """Values and accuracy of the finished trials."""
        file = folder / "trials.json"
        return [(values, score) for values, score in json.loads(file.read_text())] if file.is_file() else []

    def do(self, folder: Path) -> None:
        """Spend what is left of the budget."""
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=f"sqlite:///{folder / 'study.db'}", study_name=self.text, direction="maximize", load_if_exists=True
        )
        grid = self.benchmark.grid(self.candidate, self.task)
        while len(finished := study.get_trials(states=[optuna.trial.TrialState.COMPLETE])) < self.budget:
            # A sampler of its own for each trial, so that a resumed study draws what the uninterrupted one would.
            study.sampler = optuna.samplers.TPESampler(
                n_startup_trials=STARTUP_TRIALS, seed=1000 * self.seed + len(finished)
            )
            running = study.get_trials(states=[optuna.trial.TrialState.RUNNING])
            number = running[0].number if running and len(running[0].params) == len(grid) else None
            if number is None:
                for trial in running:  # killed while its values were drawn
                    study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                trial = study.ask(_distributions(optuna, grid))
                number, values = trial.number, trial.params
            else:
                values = running[0].params
            piece = self.benchmark.trial(self.candidate, self.task, values, self.seed)
            output = folder.parents[2]
            work_through([piece], output)
            study.tell(number, piece.score(output))
            self._write(folder, study, optuna)
        self._write(folder, study, optuna)

    @staticmethod
    def _write(folder: Path, study, optuna) -> None:
        finished = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
        write_json(folder / "trials.json", [[trial.params, trial.value] for trial in finished])


def _distributions(optuna, grid: Mapping[str, Sequence]) -> dict:
    """A logarithmic range between the smallest and the largest of positive rates or scales; else the values."""
    return {
        option: optuna.distributions.FloatDistribution(min(values), max(values), log=True)
        if len(values) > 2 and all(isinstance(value, float | int) and value > 0 for value in values) and _scales(option)
        else optuna.distributions.CategoricalDistribution(list(values))
        for option, values in grid.items()
    }


def _scales(option: str) -> bool:
    return option.rpartition(".")[2] in ("lr", "head_lr", "weight_decay", "scale")


def _optuna():
    try:
        import optuna
    except ImportError as error:
        raise ConfigurationError(
            "--search optuna needs Optuna; install it with pip install 'visionpeft[search]', or use --search grid"
        ) from error
    return optuna


def pieces(
    benchmark: Benchmark, candidate: MethodCandidate, task: str, budget: int, seed: int
) -> list[Trial] | list[OptunaStudy]:
    """What has to be done to choose hyper-parameters of a method on a task; nothing where nothing is searched."""
    grid = benchmark.grid(candidate, task)
    if benchmark.search == "none" or not grid:
        return []
    if benchmark.search == "optuna":
        _optuna()
        return [OptunaStudy(benchmark, candidate, task, budget, seed)]
    return [benchmark.trial(candidate, task, values, seed) for values in grid_points(grid)]


def choose(benchmark: Benchmark, candidate: MethodCandidate, task: str, budget: int, seed: int, output: Path) -> Chosen:
    """What the finished pieces say."""
    grid, recipe = benchmark.grid(candidate, task), benchmark.recipe(candidate)
    if benchmark.search == "none" or not grid:
        return Chosen({}, "not searched: as configured" if grid or not benchmark.paper else "the paper")
    if benchmark.search == "optuna":
        study = OptunaStudy(benchmark, candidate, task, budget, seed)
        trials = study.trials(output / study.name)[:budget]
        by = f"Optuna, {len(trials)} trials in the ranges of the {recipe.source}"
    else:
        points = grid_points(grid)
        trials = [(values, benchmark.trial(candidate, task, values, seed).score(output)) for values in points]
        by = f"{recipe.source}, {len(points)} trials"
    values, score = best(trials)
    return Chosen(values, by, score)
