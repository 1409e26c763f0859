"""A search: members are judged on validation, the best is trained again for each seed, and tested once."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from visionpeft.adapters.attach import detach
from visionpeft.errors import ConfigurationError
from visionpeft.protocols import work
from visionpeft.protocols.cells import Training, find_run, settle, train
from visionpeft.protocols.further_arguments import overlays_of, refuse_replaced, split_overlays
from visionpeft.protocols.method_candidates import MethodCandidate, configs_of_methods
from visionpeft.protocols.method_protocols import PREFIXES, SEEDS, collect, tasks_of
from visionpeft.protocols.method_runs import Benchmark
from visionpeft.runs.before_training import check_judged
from visionpeft.runs.cli import CLI
from visionpeft.runs.config_files import config_content, config_name
from visionpeft.runs.history import read_history
from visionpeft.searching.plan import Judged, OwnData, SearchPlan
from visionpeft.searching.space import Host, Space
from visionpeft.searching.trials import Costs
from visionpeft.tasks import ImageClassification

BUDGET = 100
BASE = "vtab_lora.yaml"
BENCHMARKS = {"VTAB1k": "vtab1k", "ClipArt": "vtab1k", "FGVC": "fgvc"}


def search(
    space: Space,
    base: str = BASE,
    tasks: Sequence[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    budget: int = BUDGET,
    max_parameters: int | None = None,
    search_epochs: int | None = None,
    against: Sequence[str] = (),
    root: str | None = None,
    output: str | Path = "runs/search",
    arguments: Sequence[str] = (),
    workers: work.Workers = 1,
) -> tuple[list[Judged], list[dict]]:
    """Judge members of a space on validation, train the best on everything for each seed, and test it once.

    What is finished in the output is not done again; the next round of members follows from seed and scores.

    Args:
        space: the space.
        base: configuration of `visionpeft.fit` whose method is replaced.
        tasks: of VTAB-1k or FGVC if the configuration is of one of them; None is all that are there. Of other data
            none: the configuration says it, and trains on its training split alone.
        seeds: of the final trainings; the first is also that of the search.
        budget: members that are judged on each task.
        max_parameters: most values that a member may train outside the head.
        search_epochs: epochs of the supernet or of each trial; None for those of the final training.
        against: methods, or configurations of them, that are trained alone beside it, as configured and for as many
            steps as search and final training have together.
        root: folder of the data.
        output: folder of the runs.
        arguments: further arguments of `visionpeft.fit`.
        workers: processes on this machine, or "ray" for a Ray cluster; others may share the folder at the same time.

    Returns:
        All trials, and a row for each final training.

    Raises:
        ConfigurationError: a budget below one trial, a space without a member that fits, no validation split, data of
            other labels than classes, or an output of another search.
    """
    seeds, output = tuple(seeds), Path(output)
    _check_numbers(seeds, budget, search_epochs)
    work.check_workers(workers)
    refuse_replaced("method", arguments, "--space, whose --space_options say what it tries", fields=True)
    overlays, given = split_overlays(arguments)
    module = _data_of(base, overlays)
    name = BENCHMARKS.get(module)
    benchmark = (Benchmark if name else OwnData)(name or module, root, overlays, given, "none")
    if name is None and (tasks or against):
        raise ConfigurationError(
            f"--tasks and --against are for configurations of {' and '.join(PREFIXES)}, and {base} has data of its "
            "own; leave them out, and give its options as --data.*"
        )
    tasks = tasks_of(benchmark, tasks) if name else [config_name(base)]
    singles = [
        MethodCandidate(config_name(each).removeprefix(PREFIXES[name]), each, module)
        for each in _configs(against, name)
    ]
    plan = SearchPlan(
        space, benchmark, MethodCandidate(config_name(base), base, module), search_epochs, seeds[0], max_parameters
    )
    hosts = {task: _host(plan, task) for task in tasks}
    for single in singles:  # what is wrong with one shows before the search, and not after it
        CLI(benchmark.arguments(single, tasks[0], {}, seeds[0], "final"))
    settle(
        output,
        "search.json",
        {
            "space": space.name,
            "space_options": json.loads(json.dumps(vars(space))),
            "base": base,
            "root": root,
            "arguments": [*overlays, *given],
            "budget": budget,
            "max_parameters": max_parameters,
            "search_epochs": search_epochs,
            "search_seed": seeds[0],
        },
    )
    supernets = [training for task in tasks if (training := plan.supernet(task)) is not None]
    train(supernets, output, workers)
    judged = _judge(plan, hosts, budget, output, workers)
    best = {task: _best([each for each in judged if each.task == task]) for task in tasks}
    steps = {task: _search_steps(plan, task, judged, output) for task in tasks}
    train([plan.final(task, seed, best[task], steps[task]) for task in tasks for seed in seeds], output, workers)
    if singles:
        costs = {(task, single): plan.costs(single, task) for task in tasks for single in singles}
        work.finish(list(costs.values()), output, workers)
        train(_alone(plan, costs, seeds, best, steps, output), output, workers)
    # Each row with its steps, as what is compared should have made as many.
    return judged, [row | {"steps": round(_last(Path(row["run_directory"]))["step"])} for row in collect(output)]


def _check_numbers(seeds: Sequence[int], budget: int, epochs: int | None) -> None:
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigurationError(f"name at least one seed, each once and none negative, not {list(seeds)}")
    if budget < 1:
        raise ConfigurationError(f"--budget {budget} is below one trial; give 1 or more")
    if epochs is not None and epochs < 1:
        raise ConfigurationError(f"--search_epochs must be 1 or more, not {epochs}")


def _configs(against: Sequence[str], benchmark: str | None) -> list[str]:
    """Configurations of methods that are named by themselves or by their configuration."""
    found = []
    for name in against:
        found += [name] if name.endswith(".yaml") else configs_of_methods([name], PREFIXES[benchmark])
    return list(dict.fromkeys(found))


def _data_of(base: str, overlays: Sequence[str]) -> str:
    """Name of the data module that configurations name."""
    found = ""
    for config in (base, *overlays_of(overlays)):
        content = config_content(config)
        if isinstance(content, dict) and isinstance(content.get("data"), dict):
            found = str(content["data"].get("class_path", found))
    return found.rpartition(".")[2]


def _host(plan: SearchPlan, task: str) -> Host:
    """The backbone of a task, after everything was refused that can be known to fail before training.

    Raises:
        ConfigurationError: see `search`.
    """
    method = plan.space.supernet(plan.seed)
    cli = CLI(plan.benchmark.arguments(plan.base, task, {}, plan.seed, "trial"))
    if not isinstance(cli.model, ImageClassification):
        raise ConfigurationError(
            f"a search chooses methods of ImageClassification, and {plan.base.config} trains {type(cli.model).__name__}"
        )
    if cli.model.objective.labels != "classes":
        raise ConfigurationError(
            f"a search chooses by accuracy, which labels {cli.model.objective.labels!r} do not have"
        )
    cli.datamodule.setup()
    if "val" not in cli.datamodule.sources:
        raise ConfigurationError(
            f"a search chooses on validation, and the data of {plan.base.config} has no validation split; give one, "
            "such as --data.val val.csv or --data.val_fraction 0.1"
        )
    detach(cli.model.model)
    host = Host(plan.space, cli.model.model, plan.limit)
    host.check()
    smallest = plan.space.methods(plan.space.smallest(host))
    trial = CLI(plan.arguments(task, smallest if method is None else method, plan.seed, "trial"))  # as a training does
    if method is None:  # members of a supernet are validated by themselves
        check_judged(trial.config_init.trainer, "a trial")
    CLI(plan.arguments(task, smallest, plan.seed, "final")).datamodule.setup()
    return host


def _judge(plan: SearchPlan, hosts: dict[str, Host], budget: int, output: Path, workers: work.Workers) -> list[Judged]:
    """All trials, round by round, those of all tasks together."""
    rounds = {task: plan.space.rounds(host, budget, plan.seed) for task, host in hosts.items()}
    waiting = {task: next(each, None) for task, each in rounds.items()}
    judged = []
    while waiting := {task: members for task, members in waiting.items() if members}:
        trials = {task: [plan.trial(task, member) for member in members] for task, members in waiting.items()}
        every = [trial for own in trials.values() for trial in own]
        for trial in every:
            trial.check(output / trial.name)
        work.finish(every, output, workers)
        following = {}
        for task, own in trials.items():
            scores = [trial.score(output) for trial in own]
            judged += [
                Judged(task, member := trial.judged(output), plan.space.text(member), score, trial.costs(output), steps)
                for trial, score in zip(own, scores, strict=True)
                for steps in (trial.steps(output),)
            ]
            try:
                following[task] = rounds[task].send(scores)
            except StopIteration:
                following[task] = None
        waiting = following
    return judged


def _best(judged: Sequence[Judged]) -> Judged:
    """Highest accuracy on validation; of equal ones that with the fewest trained values, then the first.

    Raises:
        ConfigurationError: all diverged.
    """
    best = min(judged, key=lambda each: (-each.val_top1, each.costs["parameters"]))
    if best.val_top1 < 0:
        raise ConfigurationError(f"all {len(judged)} trials on {best.task} diverged; give a smaller learning rate")
    return best


def _search_steps(plan: SearchPlan, task: str, judged: Sequence[Judged], output: Path) -> int:
    """Optimiser steps that the search on a task has taken."""
    if supernet := plan.supernet(task):
        return _steps(output / supernet.name)[0]
    return sum(each.steps for each in judged if each.task == task)


def _steps(folder: Path) -> tuple[int, int]:
    """Optimiser steps and epochs of a finished training."""
    last = _last(find_run(folder).path)
    return round(last["step"]), round(last["epoch"]) + 1


def _last(run: Path) -> dict[str, float]:
    """What the history of a run says of its last epoch."""
    return read_history(run / "metrics.csv")[-1]


def _alone(
    plan: SearchPlan,
    costs: Mapping[tuple[str, MethodCandidate], Costs],
    seeds: Sequence[int],
    best: Mapping[str, Judged],
    steps: Mapping[str, int],
    output: Path,
) -> list[Training]:
    """The methods that the search is compared with, as configured, and for all of its steps."""
    found = []
    for (task, single), measured in costs.items():
        made, epochs = _steps(output / plan.final(task, seeds[0], best[task], steps[task]).name)
        longer = epochs + -(-steps[task] * epochs // made)
        own = measured.costs(output)
        found += [plan.single(single, task, seed, length, own) for length in (None, longer) for seed in seeds]
    return found
