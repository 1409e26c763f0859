"""VTAB-1k and FGVC: hyper-parameters chosen on validation, one training on everything for each seed, one test.

Zhai et al., A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark, 2019,
https://arxiv.org/abs/1910.04867. FGVC: Jia et al., Visual Prompt Tuning, 2022, https://arxiv.org/abs/2203.12119.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from visionpeft.data.aliases import choose as choose_name
from visionpeft.data.fgvc import fgvc_datasets
from visionpeft.data.vtab import vtab1k_tasks
from visionpeft.errors import ConfigurationError
from visionpeft.protocols import work
from visionpeft.protocols.cells import Training, find_run, settle, train
from visionpeft.protocols.further_arguments import refuse_replaced, split_overlays
from visionpeft.protocols.method_candidates import Measured, MethodCandidate, measure, method_candidates
from visionpeft.protocols.method_runs import CLIP_ART, Benchmark, available
from visionpeft.protocols.search import choose, pieces
from visionpeft.sharing.run_directory import tested_images

SEEDS = (1, 2, 3)
BUDGET = 20
PREFIXES = {"vtab1k": "vtab_", "fgvc": "fgvc_"}
DATA = {"vtab1k": "VTAB1k", "fgvc": "FGVC"}
Search = Literal["grid", "optuna", "none"]


def vtab1k(
    configs: Sequence[str],
    tasks: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    search: Search = "grid",
    budget: int = BUDGET,
    paper: bool = False,
    root: str | None = None,
    output: str | Path = "runs/vtab1k",
    arguments: Sequence[str] = (),
    workers: work.Workers = 1,
    learning_rates: Sequence[float] | None = None,
) -> list[dict]:
    """Choose on val200 after training on train800, then train on both and test after the last epoch.

    Args:
        configs: a configuration for each method.
        tasks: tasks of VTAB-1k, and "clipart", the embedded set, which is not of VTAB-1k; None is all that are there.
        seeds: of the final trainings; the first is also that of the trials. None is 1, 2, 3, or the paper's.
        search: how hyper-parameters are chosen: the recipe's "grid", "optuna" in its ranges, or "none".
        budget: trials of each method on each task, for Optuna.
        paper: train and report as each paper did, which some did by selecting on the test split; tables say so.
        root: folder of the task folders; None has the rendered and embedded tasks.
        output: folder of the runs; what is finished in it is not trained again, and its table has all of it.
        arguments: further arguments of `visionpeft.fit`.
        workers: processes on this machine, or "ray" for a Ray cluster; others may share the folder at the same time.
        learning_rates: what is tried in the place of every recipe's grid, so that all methods have the same trials.

    Raises:
        ConfigurationError: an unknown task or option, or an output of other settings.
    """
    return _compare(
        "vtab1k", configs, tasks, seeds, search, budget, paper, root, output, arguments, workers, learning_rates
    )


def fgvc(
    configs: Sequence[str],
    tasks: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    search: Search = "grid",
    budget: int = BUDGET,
    paper: bool = False,
    root: str | None = None,
    output: str | Path = "runs/fgvc",
    arguments: Sequence[str] = (),
    workers: work.Workers = 1,
    learning_rates: Sequence[float] | None = None,
) -> list[dict]:
    """Choose on val after training on train, then train on both and test after the last epoch.

    Args:
        configs: a configuration for each method.
        tasks: cub, nabirds, oxford_flowers, stanford_dogs, stanford_cars; None is all that are there.
        seeds: as in `vtab1k`, as all others.
        search: how hyper-parameters are chosen.
        budget: trials of each method on each set, for Optuna.
        paper: train and report as each paper did.
        root: folder in which the sets lie; needed.
        output: folder of the runs.
        arguments: further arguments of `visionpeft.fit`.
        workers: processes on this machine, or "ray" for a Ray cluster.
        learning_rates: what is tried in the place of every recipe's grid.

    Raises:
        ConfigurationError: no root, an unknown set or option, or an output of other settings.
    """
    if root is None:
        raise ConfigurationError(
            "fgvc needs --root, the folder in which the sets lie; python -m visionpeft.prepare fgvc builds them"
        )
    return _compare(
        "fgvc", configs, tasks, seeds, search, budget, paper, root, output, arguments, workers, learning_rates
    )


def _compare(
    name: str,
    configs: Sequence[str],
    tasks: Sequence[str] | None,
    seeds: Sequence[int] | None,
    search: Search,
    budget: int,
    paper: bool,
    root: str | None,
    output: str | Path,
    arguments: Sequence[str],
    workers: work.Workers,
    learning_rates: Sequence[float] | None,
) -> list[dict]:
    """Search, train on everything and test, for each method and task; a row for each final training."""
    refuse_replaced("method", arguments, "--method, or --configs with a configuration for each method")
    overlays, given = split_overlays(arguments)
    benchmark = Benchmark(name, root, overlays, given, search, paper, _learning_rates(learning_rates, search, paper))
    output = Path(output)
    tasks = tasks_of(benchmark, tasks)
    if search == "optuna" and paper:
        raise ConfigurationError("--paper searches the paper's own grid; leave out --search optuna")
    work.check_workers(workers)
    if budget < 1:
        raise ConfigurationError(f"--budget must be 1 or more, not {budget}")
    candidates = method_candidates(configs, PREFIXES[name], [DATA[name]])
    seeds_of = {candidate.name: _seeds(benchmark, candidate, seeds) for candidate in candidates}
    searched = {
        (candidate, task): pieces(benchmark, candidate, task, budget, seeds_of[candidate.name][0])
        for task in tasks
        for candidate in candidates
    }
    measured = _measure(benchmark, candidates, tasks, searched)
    _check_output(output, benchmark, budget, _one_optimiser(measured) if benchmark.learning_rates else None)

    trials = [piece for some in searched.values() for piece in some]
    finals = sum(len(seeds_of[candidate.name]) for candidate, _ in searched)
    print(f"tasks: {', '.join(tasks)}; {_trials(trials)} and {finals} final trainings", flush=True)
    for piece in trials:
        if isinstance(piece, Training):
            piece.check(output / piece.name)
    work.finish(trials, output, workers)
    # Numbers of prompts or ranks may be chosen, or be the paper's for a task: memory is that of what is trained.
    saved_bytes = {
        (candidate.name, benchmark.model_options(candidate, tasks[0], {})): measured[candidate.name].saved_bytes
        for candidate in candidates
    }
    trainings = []
    for candidate, task in searched:
        own = seeds_of[candidate.name]
        chosen = choose(benchmark, candidate, task, budget, own[0], output)
        model = candidate.name, benchmark.model_options(candidate, task, chosen.values)
        if model not in saved_bytes:
            saved_bytes[model] = measure(benchmark.arguments(candidate, task, chosen.values, 0, "final")).saved_bytes
        trainings += [benchmark.final(candidate, task, chosen, seed, saved_bytes[model]) for seed in own]
    train(trainings, output, workers)
    return collect(output)


def collect(output: Path) -> list[dict]:
    """A row for each finished final training in the folder of a benchmark, by whomever it was made."""
    rows = []
    for file in sorted(Path(output).glob("final/*/cell.json")):
        run = find_run(file.parent)
        if run is not None and run.results.is_file():
            rows.append(_row(json.loads(file.read_text())["about"], run.read_results()))
    return rows


def _row(about: dict, results: dict) -> dict:
    data, backbone = results["data"], results["backbone"]
    subset = data.get("test_subset") or {}
    return {
        **{key: value for key, value in about.items() if key != "hyper_parameters"},
        "hyper_parameters": json.dumps(about["hyper_parameters"]),
        "top1": results["test"]["top1"],
        "mean_per_class": results["test"]["mean_per_class"],
        "test_images": tested_images(results),
        "of_test_images": subset.get("of", data["sizes"]["test"]),
        "reported": results["reported"],
        "backbone": backbone["name"],
        "checkpoint": _checkpoint(backbone),
        "normalisation": data["normalisation"]["source"],
        "mean": json.dumps(data["normalisation"]["mean"]),
        "std": json.dumps(data["normalisation"]["std"]),
        "input_size": json.dumps(data["input_size"]),
        "data": f"{data['dataset']}{', rendered' if data.get('rendered') else ''}",
        "trained_on": data["trained_on"],
        "data_notes": "; ".join(data["notes"]),
        "trained_parameters": results["parameters"]["trainable"],
        "adapter_parameters": results["parameters"]["adapter"],
        "training_seconds": results["training_seconds"],
        "run_directory": results["run_directory"],
    }


def _checkpoint(backbone: dict) -> str:
    if backbone.get("checkpoint"):
        return str(backbone["checkpoint"])
    return backbone["name"] if backbone.get("pretrained") else "none: random weights"


def tasks_of(benchmark: Benchmark, names: Sequence[str] | None) -> list[str]:
    """The tasks that are named, or all that are there.

    Raises:
        ConfigurationError: one does not exist or is named twice, or none is there.
    """
    if names is None:
        found = available(benchmark.name, benchmark.root)
        if not found:
            raise ConfigurationError(f"no task folder of {benchmark.name} is in {benchmark.root}")
        return found
    if benchmark.name == "vtab1k":
        known = {task: entry["aliases"] for task, entry in vtab1k_tasks().items()} | {CLIP_ART: []}
    else:
        known = {dataset: entry["folders"] for dataset, entry in fgvc_datasets().items()}
    tasks = [choose_name(task, known, f"{benchmark.name} task") for task in names]
    if len(set(tasks)) < len(tasks):
        raise ConfigurationError(f"each task may be named once, but got {', '.join(names)}")
    return tasks


def _learning_rates(values: Sequence[float] | None, search: str, paper: bool) -> tuple[float, ...]:
    if values is None:
        return ()
    if paper or search == "none":
        setting = "--paper, which has the paper's" if paper else "--search none, which leaves the configuration's"
        raise ConfigurationError(f"--learning_rates are tried out, but not with {setting}; leave out one of the two")
    if not values or len(set(values)) < len(values) or not all(0 < value < math.inf for value in values):
        raise ConfigurationError(f"learning rates are different numbers above 0, but got {list(values)}")
    return tuple(values)


def _seeds(benchmark: Benchmark, candidate: MethodCandidate, given: Sequence[int] | None) -> tuple[int, ...]:
    seeds = tuple(given or (benchmark.paper and benchmark.recipe(candidate).seeds) or SEEDS)
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigurationError(f"each seed may be named once and none is negative, but got {list(seeds)}")
    return seeds


def _measure(benchmark: Benchmark, candidates: Sequence[MethodCandidate], tasks: Sequence[str], searched) -> dict:
    """Build every method and every task once, so that a mistake shows before hours of training.

    Returns:
        For each method what its trainings are like.
    """
    measured = {}
    for candidate in candidates:
        first = [piece for piece in searched[candidate, tasks[0]] if isinstance(piece, Training)][:1]
        for trial in first:
            measure(trial.arguments)  # for what its recipe says
        for task in tasks if candidate is candidates[0] else tasks[:1]:
            found = measure(
                benchmark.arguments(candidate, task, {}, 0, "final"), judged=bool(searched[candidate, task])
            )
            measured.setdefault(candidate.name, found)
    return measured


def _one_optimiser(measured: Mapping[str, Measured]) -> str:
    """The optimiser of all methods, which the same learning rates are about.

    Raises:
        ConfigurationError: their recipes have different ones.
    """
    names: dict[str, list[str]] = {}
    for name, found in measured.items():
        names.setdefault(found.optimiser, []).append(name)
    if len(names) > 1:
        recipes = " and ".join(f"{', '.join(some)} with {optimiser}" for optimiser, some in names.items())
        raise ConfigurationError(
            f"--learning_rates are the same for all methods, but their recipes train {recipes}; add "
            "--model.optimisation.optimizer adamw --model.optimisation.scale_lr_by_batch null, or compare them apart"
        )
    (optimiser,) = names
    return optimiser


def _check_output(output: Path, benchmark: Benchmark, budget: int, optimiser: str | None) -> None:
    """Refuse a folder whose table would mix trainings of other settings."""
    settings = {
        "protocol": benchmark.name,
        "root": benchmark.root,
        "arguments": [*benchmark.overlays, *benchmark.given],
        "search": benchmark.search,
        "budget": budget if benchmark.search == "optuna" else None,
        "paper": benchmark.paper,
        "learning_rates": list(benchmark.learning_rates) or None,  # None in folders older than the option, too
        "optimiser": optimiser,  # of all methods, where all have the same learning rates
    }
    settle(output, "protocol.json", settings)


def _trials(trials: Sequence) -> str:
    if not trials:
        return "no search"
    return f"{len(trials)} trials" if isinstance(trials[0], Training) else f"{len(trials)} studies"
