"""`python -m visionpeft.evaluate RUN`: test what a finished run has trained again."""

import argparse

from visionpeft.errors import ConfigurationError
from visionpeft.files import write_json
from visionpeft.protocols.evaluation import evaluate_again, evaluate_run
from visionpeft.protocols.report import report
from visionpeft.runs.tables import print_results
from visionpeft.sharing.run_directory import RunDirectory

USAGE = """\
usage: python -m visionpeft.evaluate RUN [--data.OPTION VALUE ...] [--trainer.OPTION VALUE ...]
       python -m visionpeft.evaluate RUN --protocol base_to_new
       python -m visionpeft.evaluate RUN --protocol cross_dataset|domain_shift --datasets NAME ... [--data.root DIR]"""


def evaluate(arguments: list[str]) -> None:
    """Test the run on its own data, as options change it, or on the data of a protocol; write the results into RUN."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    if arguments[0].startswith("-"):
        raise ConfigurationError(f"name the run directory first; {USAGE}")
    run = RunDirectory.existing(arguments[0])
    options, further = _parse(arguments[1:])
    if options.protocol is not None:
        rows = evaluate_run(run, options.protocol, options.datasets, further)
        report(options.protocol, rows, run.path / options.protocol)
        return
    if options.datasets:
        raise ConfigurationError("--datasets belongs to --protocol; another data set alone is --data.dataset NAME")
    results = evaluate_again(run, further)
    write_json(run.evaluation, results)
    print_results(results)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a protocol, and the others, which change the configuration of the run."""
    parser = argparse.ArgumentParser(usage=USAGE, allow_abbrev=False, add_help=False)
    parser.add_argument("--protocol")
    parser.add_argument("--datasets", nargs="+", default=[])

    def refuse(message: str):
        raise ConfigurationError(f"{message}; {USAGE}")

    parser.error = refuse
    return parser.parse_known_args(arguments)
