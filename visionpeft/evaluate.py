"""`python -m visionpeft.evaluate RUN`: test the adapter of a finished run again."""

import sys

from visionpeft.attach import detach
from visionpeft.cli import CLI, command
from visionpeft.errors import ConfigurationError
from visionpeft.reports.progress import TrainingProgress
from visionpeft.reports.tables import print_results
from visionpeft.reports.test_record import TestRecord
from visionpeft.results import setting, test_numbers
from visionpeft.run_directory import RunDirectory, write_json
from visionpeft.storage import load

USAGE = "usage: python -m visionpeft.evaluate RUN [--data.OPTION VALUE ...] [--trainer.OPTION VALUE ...]"


def evaluate(arguments: list[str]) -> None:
    """Build backbone and data from RUN/config.yaml, load RUN/adapter, test, and write RUN/evaluation.json."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    if arguments[0].startswith("-"):
        raise ConfigurationError(f"name the run directory first; {USAGE}")
    run = RunDirectory.existing(arguments[0])
    trained = run.read_results()
    cli = CLI(["--config", str(run.config), *arguments[1:]])
    task, datamodule = cli.model, cli.datamodule
    detach(task.model)
    task.adapter_name = load(task.model, run.adapter)

    record = TestRecord(len(task.class_names))
    trainer = cli.build_trainer(
        [record, TrainingProgress()], logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.test(task, datamodule, verbose=False)
    results = (
        trained | setting(task, datamodule) | {"test": test_numbers(trainer, record), "run_directory": str(run.path)}
    )
    write_json(run.evaluation, results)
    print_results(results)


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m visionpeft.evaluate`; returns the exit code."""
    return command(evaluate, arguments)


if __name__ == "__main__":
    sys.exit(main())
