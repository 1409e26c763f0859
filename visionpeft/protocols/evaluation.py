"""Test a finished run again: on its own data, on new classes, or on another data set."""

import json
from collections.abc import Sequence

import yaml

from visionpeft.errors import ConfigurationError
from visionpeft.files import write_json
from visionpeft.protocols.cells import Cell
from visionpeft.protocols.learner_candidates import LearnerCandidate, dataset_keys, only_test
from visionpeft.runs.as_trained import TestedAgain
from visionpeft.runs.limits import check_limits
from visionpeft.runs.progress import TrainingProgress
from visionpeft.runs.results import record_of, setting, tested
from visionpeft.sharing.run_directory import RunDirectory, tested_images

PROTOCOLS = ("base_to_new", "cross_dataset", "domain_shift")


def evaluate_again(run: RunDirectory, arguments: Sequence[str]) -> dict:
    """Build task and data from RUN/config.yaml with changes, load what was trained, and test.

    Args:
        run: a finished run.
        arguments: what is changed, such as `--data.classes new`.

    Returns:
        Its results.json with the new test in place of the old.

    Raises:
        ConfigurationError: what was trained knows only its own classes, and there are others; or another method, head
            or learner is asked for than the one that was trained, or what belongs to a training alone.
    """
    trained = run.read_results()
    cli = TestedAgain(run, [*arguments])
    check_limits(cli, "limit_test_batches", tested=run)
    task, datamodule = cli.model, cli.datamodule
    task.load(run.path / task.folder)
    task.connect(datamodule)
    record = record_of(task, datamodule, cli.config.calibration_bins)
    trainer = cli.build_trainer(
        [record, TrainingProgress()], logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.test(task, datamodule, verbose=False)
    return trained | setting(task, datamodule) | tested(trainer, record) | {"run_directory": str(run.path)}


def evaluate_elsewhere(run: RunDirectory, dataset: str, classes: str, source: str) -> dict:
    """Test on some classes of a data set, once: the result stays in RUN/evaluations.

    Args:
        run: a finished run.
        dataset: the data set.
        classes: "all", "base" or "new".
        source: the data set of the training.
    """
    changes = only_test(dataset, classes, elsewhere=dataset != source)
    file = run.path / "evaluations" / f"{dataset}-{classes}.json"
    if file.is_file():
        known = json.loads(file.read_text())
        if known["arguments"] == changes:
            return known["results"]
    results = evaluate_again(run, changes)
    file.parent.mkdir(exist_ok=True)
    write_json(file, {"arguments": changes, "results": results})
    return results


def evaluate_run(
    run: RunDirectory, protocol: str, datasets: Sequence[str] = (), arguments: Sequence[str] = ()
) -> list[dict]:
    """Rows of a protocol for a finished run: its own test, and tests of what it learnt on other classes or data sets.

    Args:
        run: trained on base classes for base-to-new, on a source for the others.
        protocol: "base_to_new", "cross_dataset" or "domain_shift".
        datasets: the targets of cross-dataset and domain shift.
        arguments: further arguments of the new tests, such as `--data.root`.

    Raises:
        ConfigurationError: an unknown protocol, a run it does not suit, no targets, or a learner that knows only its
            own classes.
    """
    if protocol not in PROTOCOLS:
        raise ConfigurationError(f"there is no protocol {protocol!r} for a finished run; use {', '.join(PROTOCOLS)}")
    cell = trained_cell(run)
    if protocol == "base_to_new":
        if datasets:
            raise ConfigurationError("base_to_new tests on the run's own data set; leave out --datasets")
        if cell.classes != "base":
            raise ConfigurationError(
                f"{run.path} was trained on {cell.classes} classes; base_to_new needs a run of the base classes "
                "(--data.classes base)"
            )
        elsewhere = [(cell.dataset, "new")]
    else:
        targets = [dataset for dataset in dict.fromkeys(dataset_keys(datasets)) if dataset != cell.dataset]
        if not targets:
            raise ConfigurationError(f"{protocol} needs other data sets to test on: --datasets NAME ...")
        elsewhere = [(target, "all") for target in targets]
    own = run.read_results() | {"run_directory": str(run.path)}
    rows = [row(protocol, cell, cell.dataset, cell.classes, own)]
    for dataset, classes in elsewhere:
        # What the arguments say about the other data set counts more than what is reset for it.
        reset = only_test(dataset, classes, elsewhere=dataset != cell.dataset)
        results = evaluate_again(run, [*reset, *arguments, *only_test(dataset, classes)])
        rows.append(row(protocol, cell, dataset, classes, results))
    return rows


def trained_cell(run: RunDirectory) -> Cell:
    """What a finished run was trained on.

    Raises:
        ConfigurationError: it has no learner, or was not trained on a few-shot data set.
    """
    results = run.read_results()
    data = yaml.safe_load(run.config.read_text(encoding="utf-8"))["data"]["init_args"]
    if "learner" not in results or not {"dataset", "classes", "shots"} <= data.keys():
        raise ConfigurationError(
            f"{run.path} is no run of a learner on a few-shot data set, and a classification head knows only its own "
            "classes"
        )
    name = results["learner"]["class"]
    (dataset,) = dataset_keys([data["dataset"]])
    return Cell(LearnerCandidate(name, str(run.config)), dataset, data["classes"], data["shots"], results["seed"])


def row(protocol: str, cell: Cell, dataset: str, classes: str, results: dict) -> dict:
    """One measured accuracy with everything it depends on.

    Args:
        protocol: which.
        cell: what was trained.
        dataset: what was tested on,
        classes: and which of its classes.
        results: of the test.
    """
    return {
        "protocol": protocol,
        "learner": cell.learner.name,
        "configuration": cell.learner.config,
        "backbone": results["backbone"]["name"],
        "dataset": cell.dataset,
        "trained_classes": cell.classes,
        "shots": cell.shots,
        "seed": cell.seed,
        "tested_on": dataset,
        "classes": classes,
        "number_of_classes": results["data"]["classes"],
        "test_images": tested_images(results),
        "of_test_images": (results["data"].get("test_subset") or {}).get("of", results["data"]["sizes"]["test"]),
        "top1": results["test"]["top1"],
        "mean_per_class": results["test"]["mean_per_class"],
        "confidence": results["test"].get("confidence"),
        "ece": results["test"].get("ece"),
        **{f"{name}_without_adaptation": value for name, value in results.get("without_adaptation", {}).items()},
        "template": _template(results.get("template")),
        "trained_parameters": results["parameters"]["trainable"],
        "training_seconds": results["training_seconds"],
        "reported": results["reported"],
        "run_directory": results["run_directory"],
    }


def _template(templates: list[str] | None) -> str:
    if not templates:
        return ""
    return templates[0] if len(templates) == 1 else f"{templates[0]} and {len(templates) - 1} more"
