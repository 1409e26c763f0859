"""The four protocols. Each trains what is not finished yet and returns its rows, one for each measured accuracy.

Few-shot: Zhou et al., Learning to Prompt for Vision-Language Models, 2021, https://arxiv.org/abs/2109.01134.
The others: Zhou et al., Conditional Prompt Learning for Vision-Language Models, 2022, https://arxiv.org/abs/2203.05557.
"""

from collections.abc import Sequence
from pathlib import Path

from visionpeft.errors import ConfigurationError
from visionpeft.protocols.cells import finish, plan
from visionpeft.protocols.evaluation import evaluate_elsewhere, row
from visionpeft.protocols.learner_candidates import candidates, dataset_keys, only_test
from visionpeft.protocols.work import Workers

SHOTS = (1, 2, 4, 8, 16)
SEEDS = (1, 2, 3)
CROSS_DATASET_TARGETS = (
    "caltech101",
    "oxford_pets",
    "stanford_cars",
    "oxford_flowers",
    "food101",
    "fgvc_aircraft",
    "sun397",
    "dtd",
    "eurosat",
    "ucf101",
)
DOMAIN_SHIFT_TARGETS = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")


def few_shot(
    configs: Sequence[str],
    datasets: Sequence[str] = ("clipart",),
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = SEEDS,
    output: str | Path = "runs/few_shot",
    arguments: Sequence[str] = (),
    workers: Workers = 1,
) -> list[dict]:
    """Train on a few images of every class, test on the whole test split.

    Args:
        configs: a configuration for each learner.
        datasets: data sets, each trained and tested on its own.
        shots: numbers of training images of a class.
        seeds: each draws its own images and initial values.
        output: folder of the runs; finished ones in it are not trained again.
        arguments: further arguments of `visionpeft.fit`, such as `--data.root DATA`.
        workers: processes on this machine, or "ray" for a Ray cluster; others may share the folder at the same time.

    Raises:
        ConfigurationError: see `candidates` and `finish`.
    """
    datasets = dataset_keys(datasets)
    _check(datasets=datasets, shots=shots, seeds=seeds)
    learners = candidates(configs, datasets, "all", [], arguments)
    runs = finish(plan(learners, datasets, "all", shots, seeds), arguments, Path(output), workers)
    return [row("few_shot", cell, cell.dataset, "all", run.read_results()) for cell, run in runs]


def base_to_new(
    configs: Sequence[str],
    datasets: Sequence[str] = ("clipart",),
    shots: int = 16,
    seeds: Sequence[int] = SEEDS,
    output: str | Path = "runs/base_to_new",
    arguments: Sequence[str] = (),
    workers: Workers = 1,
) -> list[dict]:
    """Train on the first half of the classes; test on it, and with the names of the others on the second half.

    The two halves are scored apart: test images of base classes among base classes, those of new among new.

    Args:
        configs: a configuration for each learner.
        datasets: data sets, each trained and tested on its own.
        shots: training images of a class.
        seeds: each draws its own images and initial values.
        output: folder of the runs; finished ones in it are not trained again.
        arguments: further arguments of `visionpeft.fit`.
        workers: processes on this machine, or "ray" for a Ray cluster.

    Raises:
        ConfigurationError: a learner that knows only its own classes; see also `candidates` and `finish`.
    """
    datasets = dataset_keys(datasets)
    _check(datasets=datasets, shots=[shots], seeds=seeds)
    learners = candidates(configs, datasets, "base", [only_test(name, "new") for name in datasets], arguments)
    rows = []
    for cell, run in finish(plan(learners, datasets, "base", [shots], seeds), arguments, Path(output), workers):
        rows.append(row("base_to_new", cell, cell.dataset, "base", run.read_results()))
        rows.append(
            row("base_to_new", cell, cell.dataset, "new", evaluate_elsewhere(run, cell.dataset, "new", cell.dataset))
        )
    return rows


def cross_dataset(
    configs: Sequence[str],
    source: str = "clipart",
    targets: Sequence[str] | None = None,
    shots: int = 16,
    seeds: Sequence[int] = SEEDS,
    output: str | Path = "runs/cross_dataset",
    arguments: Sequence[str] = (),
    workers: Workers = 1,
) -> list[dict]:
    """Train on all classes of a source; test on it and, with their own class names, on targets.

    Args:
        configs: a configuration for each learner.
        source: data set of the training; ImageNet in the paper.
        targets: data sets of the tests; None is "drawings" for the embedded source, else the ten of the paper.
        shots: training images of a class.
        seeds: each draws its own images and initial values.
        output: folder of the runs; finished ones in it are not trained again.
        arguments: further arguments of `visionpeft.fit`.
        workers: processes on this machine, or "ray" for a Ray cluster.

    Raises:
        ConfigurationError: a learner that knows only its own classes; see also `candidates` and `finish`.
    """
    targets = default_targets("cross_dataset", source) if targets is None else targets
    return _transfer("cross_dataset", configs, source, targets, shots, seeds, Path(output), arguments, workers)


def domain_shift(
    configs: Sequence[str],
    source: str = "clipart",
    targets: Sequence[str] | None = None,
    shots: int = 16,
    seeds: Sequence[int] = SEEDS,
    output: str | Path = "runs/domain_shift",
    arguments: Sequence[str] = (),
    workers: Workers = 1,
) -> list[dict]:
    """As `cross_dataset`, on targets that show classes of the source in another style.

    Each target is scored over its own class names, so ImageNet-A and -R over their 200.

    Args:
        configs: a configuration for each learner.
        source: data set of the training; ImageNet in the paper.
        targets: data sets of the tests; None is "drawings" for the embedded source, else ImageNetV2, -Sketch, -A, -R.
        shots: training images of a class.
        seeds: each draws its own images and initial values.
        output: folder of the runs; finished ones in it are not trained again.
        arguments: further arguments of `visionpeft.fit`.
        workers: processes on this machine, or "ray" for a Ray cluster.

    Raises:
        ConfigurationError: a learner that knows only its own classes; see also `candidates` and `finish`.
    """
    targets = default_targets("domain_shift", source) if targets is None else targets
    return _transfer("domain_shift", configs, source, targets, shots, seeds, Path(output), arguments, workers)


def default_targets(protocol: str, source: str) -> tuple[str, ...]:
    """Targets of `cross_dataset` or `domain_shift` where none are named."""
    if dataset_keys([source]) == ["clipart"]:
        return ("drawings",)
    return CROSS_DATASET_TARGETS if protocol == "cross_dataset" else DOMAIN_SHIFT_TARGETS


def _transfer(
    protocol: str,
    configs: Sequence[str],
    source: str,
    targets: Sequence[str],
    shots: int,
    seeds: Sequence[int],
    output: Path,
    arguments: Sequence[str],
    workers: Workers,
) -> list[dict]:
    source, *targets = dataset_keys([source, *targets])
    _check(datasets=targets, shots=[shots], seeds=seeds)
    if source in targets:
        raise ConfigurationError(f"{source} is the source; leave it out of the targets, it is tested anyway")
    learners = candidates(
        configs, [source], "all", [only_test(name, "all", elsewhere=True) for name in targets], arguments
    )
    rows = []
    for cell, run in finish(plan(learners, [source], "all", [shots], seeds), arguments, output, workers):
        rows.append(row(protocol, cell, source, "all", run.read_results()))
        rows.extend(
            row(protocol, cell, target, "all", evaluate_elsewhere(run, target, "all", source)) for target in targets
        )
    return rows


def _check(datasets: Sequence[str], shots: Sequence[int], seeds: Sequence[int]) -> None:
    for what, values in (("data set", datasets), ("number of shots", shots), ("seed", seeds)):
        if not values:
            raise ConfigurationError(f"name at least one {what}")
        if len(set(values)) < len(values):
            raise ConfigurationError(f"each {what} may be named once, but got {', '.join(map(str, values))}")
    if min(shots) < 1:
        raise ConfigurationError(f"shots must be 1 or more, not {min(shots)}; learners without training have 0 anyway")
    if min(seeds) < 0:
        raise ConfigurationError(f"seeds must not be negative, but got {min(seeds)}")
