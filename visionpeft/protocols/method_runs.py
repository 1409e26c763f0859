"""Command lines of a benchmark's trainings: trials, whose validation accuracy is all that is kept, and final runs."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from visionpeft.data.fgvc import fgvc_datasets
from visionpeft.data.vtab import vtab1k_tasks
from visionpeft.errors import ConfigurationError
from visionpeft.files import write_json
from visionpeft.protocols.cells import Training, find_run
from visionpeft.protocols.further_arguments import decided_by_protocol, overlays_of
from visionpeft.protocols.method_candidates import MethodCandidate
from visionpeft.protocols.recipes import REPORTS, Recipe, as_arguments, find_recipe, paper_recipe
from visionpeft.runs.history import read_history
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.tasks.checkpointing import DivergedError

LR = "model.optimisation.lr"
CLIP_ART = "clipart"


@dataclass(frozen=True)
class Trial(Training):
    """A training on the smaller split. Its folder keeps `score.json`; the run that this names is deleted."""

    def done(self, folder: Path) -> bool:
        """Whether it has a score."""
        return (folder / "score.json").is_file()

    def do(self, folder: Path) -> None:
        """Train, and keep the validation accuracy of the last epoch; a training that diverges has none.

        Raises:
            ConfigurationError: no epoch was validated.
        """
        try:
            super().do(folder)
        except DivergedError as error:
            score = {"val_top1": None, "diverged": str(error)}
        else:
            rows = [row for row in read_history(find_run(folder).metrics) if "val/top1" in row]
            if not rows:
                raise ConfigurationError(f"no epoch of {self.text} was validated, by which it is judged")
            score = {"val_top1": rows[-1]["val/top1"], "epochs": round(rows[-1]["epoch"]) + 1}
            score["steps"] = round(rows[-1]["step"])
        trained = find_run(folder)
        write_json(folder / "score.json", score | self.kept(trained) | {"run": trained.path.name})
        self._clear(folder)

    def kept(self, run: RunDirectory) -> dict:
        """What else of the run is written into `score.json`, before it is deleted."""
        return {}

    def score(self, output: Path) -> float:
        """Validation accuracy; below all others where training diverged."""
        folder = output / self.name
        self._clear(folder)  # what a kill left
        found = json.loads((folder / "score.json").read_text())["val_top1"]
        return -1.0 if found is None else found

    @staticmethod
    def _clear(folder: Path) -> None:
        """Delete the run that was scored, and nothing else that may be in the folder."""
        name = json.loads((folder / "score.json").read_text()).get("run", "")
        run = RunDirectory(folder / Path(name).name)
        # A run has both files; the folder of the trial itself, which an empty name would give, has neither.
        if run.config.is_file() and (run.path / "environment.json").is_file() and not run.path.is_symlink():
            shutil.rmtree(run.path, ignore_errors=True)


@dataclass(frozen=True)
class Chosen:
    """Hyper-parameters of a method on a task, and how they were chosen.

    Args:
        values: of options of `visionpeft.fit`.
        by: in words.
        val_top1: accuracy on the validation split they were chosen for, where they were.
    """

    values: Mapping[str, object]
    by: str
    val_top1: float | None = None


@dataclass(frozen=True)
class Benchmark:
    """How trainings of a benchmark are told to `visionpeft.fit`.

    Args:
        name: "vtab1k" or "fgvc".
        root: folder of the data, where there is one.
        overlays: further configurations, as `--config NAME`.
        given: further arguments of the command line.
        search: how hyper-parameters are chosen: "grid", "optuna", or "none", which leaves the configuration's.
        paper: whether the papers' own rules hold.
        learning_rates: what is tried in the place of the recipe's grid, the same for all methods.
    """

    name: str
    root: str | None = None
    overlays: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    search: str = "grid"
    paper: bool = False
    learning_rates: tuple[float, ...] = ()

    def recipe(self, candidate: MethodCandidate) -> Recipe:
        """What is searched for a candidate."""
        recipe = paper_recipe(candidate.path) if self.paper else find_recipe(candidate.path)
        if self.learning_rates:
            grid = {LR: list(self.learning_rates)}
            recipe = replace(recipe, source="learning rates of the command line", grid=grid)
        return recipe

    def grid(self, candidate: MethodCandidate, task: str) -> dict[str, list]:
        """Values to choose from; in a paper's rule only of options that it leaves open."""
        recipe = self.recipe(candidate)
        fixed = {**recipe.paper, **recipe.tasks.get(task, {})} if self.paper else {}
        return {option: values for option, values in recipe.grid.items() if option not in fixed}

    def group(self, task: str) -> str:
        """VTAB-1k's group of a task; "clip art" for the embedded set; "" where there are no groups."""
        if task == CLIP_ART:
            return "clip art"
        return vtab1k_tasks()[task]["group"] if self.name == "vtab1k" else ""

    def trial(self, candidate: MethodCandidate, task: str, values: Mapping[str, object], seed: int) -> Trial:
        """A training with some hyper-parameters, to be scored on the validation split."""
        arguments = [*self.arguments(candidate, task, values, seed, "trial"), "--test", "false"]
        words = "-".join(f"{key.rpartition('.')[2]}-{_word(value)}" for key, value in values.items())
        text = f"{candidate.name} on {task}, trial of {words}"
        return Trial(f"search/{candidate.name}-{task}-seed-{seed}/{words}", text, tuple(arguments))

    def final(self, candidate: MethodCandidate, task: str, chosen: Chosen, seed: int, saved_bytes: int) -> Training:
        """The training whose test counts."""
        recipe = self.recipe(candidate)
        report = recipe.report if self.paper else "last"
        arguments = self.arguments(candidate, task, chosen.values, seed, "final")
        configs = [candidate.config, *overlays_of(self.overlays)]
        about = {
            "protocol": self.name,
            "method": candidate.name,
            "configuration": candidate.config,
            "task": task,
            "group": self.group(task),
            "seed": seed,
            "hyper_parameters": dict(chosen.values),
            "chosen_by": chosen.by,
            "val_top1": chosen.val_top1,
            "rule": f"{REPORTS[report]} (preset of the paper)" if self.paper else REPORTS[report],
            "differs_from_paper": recipe.differs if self.paper else "",
            "saved_bytes_per_image": saved_bytes,
        }
        return Training(
            f"final/{candidate.name}-{task}-seed-{seed}",
            f"{candidate.name} on {task}, seed {seed}",
            (*arguments, "--report", report, *decided_by_protocol(configs, {"test": "true"})),
            about,
        )

    def arguments(
        self, candidate: MethodCandidate, task: str, values: Mapping[str, object], seed: int, stage: str
    ) -> list[str]:
        """Command line of a "trial" or a "final" training with some hyper-parameters.

        Later ones win: configuration, task, recipe, what the command line gives, what was chosen.
        """
        return [
            *("--config", candidate.config, *self.overlays),
            *self.on(task, stage),
            *as_arguments(self._settings(candidate, task)),
            *self.given,
            *as_arguments(values),
            *("--seed_everything", str(seed), "--figures", "false"),
        ]

    def _settings(self, candidate: MethodCandidate, task: str) -> dict[str, object]:
        """What the recipe sets for a task."""
        recipe = self.recipe(candidate)
        settings = dict(recipe.settings) if self.paper or self.search != "none" else {}
        return {**settings, **recipe.paper, **recipe.tasks.get(task, {})} if self.paper else settings

    def model_options(self, candidate: MethodCandidate, task: str, values: Mapping[str, object]) -> str:
        """What recipe and hyper-parameters say of the model, without its optimisation; of equal ones it costs as much.

        Args:
            candidate: the method.
            task: the task, for which a paper may have other numbers of prompts or ranks than for the others.
            values: hyper-parameters.
        """
        options = self._settings(candidate, task) | dict(values)
        of_model = {key: each for key, each in options.items() if key.startswith("model.")}
        return json.dumps({key: of_model[key] for key in sorted(of_model) if ".optimisation" not in key})

    def on(self, task: str, stage: str) -> list[str]:
        """Data of a task: of a "trial" with a validation split, of a "final" training without."""
        both = {"trial": "train", "final": "train+val"}
        if task == CLIP_ART:
            return ["--config", "clipart.yaml", "--data.augmentation", "none", "--data.train_on", both[stage]]
        splits = {"trial": "train800", "final": "train800val200"} if self.name == "vtab1k" else both
        option = "--data.task" if self.name == "vtab1k" else "--data.dataset"
        # Published data are scored whole.
        root = [] if self.root is None else ["--data.root", self.root, "--data.test_samples", "null"]
        return [option, task, "--data.train_on", splits[stage], *root]


def available(name: str, root: str | None) -> list[str]:
    """Tasks of a benchmark that are there: in the root, or without one those that need no download."""
    if root is None:
        return [*(task for task, entry in vtab1k_tasks().items() if "rendered_factor" in entry), CLIP_ART]
    folder = Path(root)
    if name == "vtab1k":
        return [
            task
            for task, entry in vtab1k_tasks().items()
            if any((folder / other).is_dir() for other in (task, *entry["aliases"]))
        ]
    return [
        dataset
        for dataset, entry in fgvc_datasets().items()
        if any((folder / other / "train.json").is_file() for other in (dataset, *entry["folders"]))
    ]


def _word(value: object) -> str:
    return re.sub(r"[^\w.+]+", "_", value if isinstance(value, str) else json.dumps(value)).strip("_")
