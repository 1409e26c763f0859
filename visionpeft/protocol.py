"""`python -m visionpeft.protocol few_shot --configs fewshot_coop.yaml ...`: a whole table of learners on CLIP."""

import argparse
import sys
from pathlib import Path

from visionpeft.cli import Interrupted, command
from visionpeft.errors import ConfigurationError
from visionpeft.naming import did_you_mean
from visionpeft.protocols import base_to_new, cross_dataset, domain_shift, few_shot
from visionpeft.protocols.benchmarks import SEEDS, SHOTS
from visionpeft.protocols.report import report

PROTOCOLS = {
    "few_shot": few_shot,
    "base_to_new": base_to_new,
    "cross_dataset": cross_dataset,
    "domain_shift": domain_shift,
}
# What the protocol decides itself, and the option that says it.
DECIDED = {
    "--data.dataset": "--datasets",
    "--data.classes": "another protocol",
    "--data.shots": "--shots",
    "--data.seed": "--seeds",
    "--data.store": "--seeds, which repeat a draw",
    "--data.root": "--root",
    "--seed_everything": "--seeds",
    "--report": "the last epoch, which a protocol reports",
    "--resume": "the same command again, which resumes",
}


def run_protocol(arguments: list[str]) -> None:
    """Run the protocol of the command line and report it."""
    if not arguments or (arguments[0] not in PROTOCOLS and arguments[0] not in ("-h", "--help")):
        given = arguments[0] if arguments else ""
        near = did_you_mean(given, PROTOCOLS) if given else f"; it can be {', '.join(PROTOCOLS)}"
        raise ConfigurationError(f"name the protocol first, not {given!r}{near}")
    options, further = _parse(arguments)
    protocol = options.protocol
    output = options.output or Path("runs") / protocol
    chosen = {"configs": options.configs, "seeds": options.seeds, "output": output, "arguments": further}
    if protocol == "few_shot":
        chosen |= {"shots": options.shots or SHOTS, "datasets": options.datasets or ("clipart",)}
    else:
        if len(options.shots or ()) > 1:
            raise ConfigurationError(f"{protocol} trains with one number of shots, not with {len(options.shots)}")
        chosen |= {"shots": (options.shots or [16])[0]}
        if protocol == "base_to_new":
            chosen |= {"datasets": options.datasets or ("clipart",)}
        else:
            chosen |= {"source": options.source or "clipart", "targets": options.datasets}
    if options.source and protocol in ("few_shot", "base_to_new"):
        raise ConfigurationError(f"{protocol} trains and tests on the same data set: use --datasets, not --source")
    try:
        rows = PROTOCOLS[protocol](**chosen)
    except (Interrupted, KeyboardInterrupt, SystemExit):  # Lightning leaves by SystemExit when a test is interrupted
        raise Interrupted(
            f"interrupted; finished cells and epochs are kept in {output}. Give the same command again to go on"
        ) from None
    report(protocol, rows, output)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        "python -m visionpeft.protocol",
        description="Compare learners on CLIP. Finished cells are not trained again, interrupted ones are resumed.",
        epilog="Any further --config overlay, --model., --data. or --trainer. option is passed on to every training.",
        allow_abbrev=False,
    )
    parser.add_argument("protocol", choices=list(PROTOCOLS))
    parser.add_argument("--configs", nargs="+", required=True, help="a configuration for each learner")
    parser.add_argument("--datasets", nargs="+", help="data sets; of cross_dataset and domain_shift the targets")
    parser.add_argument("--source", help="data set on which cross_dataset and domain_shift train (clipart)")
    parser.add_argument(
        "--shots", nargs="+", type=int, help="training images of a class (few_shot: 1 2 4 8 16; else 16)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of draw and training (1 2 3)")
    parser.add_argument("--root", help="folder in which the data sets lie; embedded ones need none")
    parser.add_argument("--output", type=Path, help="folder of runs, tables and figures (runs/PROTOCOL)")

    def refuse(message: str):
        raise ConfigurationError(f"{message}; see python -m visionpeft.protocol --help")

    parser.error = refuse
    options, further = parser.parse_known_args(arguments)
    for argument in further:
        name = argument.partition("=")[0]
        if name in DECIDED:
            raise ConfigurationError(f"{name} is decided by the protocol; use {DECIDED[name]}")
    if options.root is not None:
        further += ["--data.root", options.root]
    return options, further


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m visionpeft.protocol`; returns the exit code."""
    return command(run_protocol, arguments)


if __name__ == "__main__":
    sys.exit(main())
