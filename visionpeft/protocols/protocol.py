"""`python -m visionpeft.protocol vtab1k --method LoRA ...`: a whole table of methods, or of learners on CLIP."""

import argparse
from pathlib import Path

from visionpeft.errors import ConfigurationError, did_you_mean
from visionpeft.protocols.further_arguments import option_of
from visionpeft.protocols.learner_protocols import SEEDS, SHOTS, base_to_new, cross_dataset, domain_shift, few_shot
from visionpeft.protocols.method_candidates import configs_of_methods
from visionpeft.protocols.method_protocols import BUDGET, PREFIXES, fgvc, vtab1k
from visionpeft.protocols.report import REPORT_FILES, report
from visionpeft.protocols.work import Workers, check_workers
from visionpeft.runs.command import Interrupted, Options

OF_METHODS = {"vtab1k": vtab1k, "fgvc": fgvc}
OF_LEARNERS = {
    "few_shot": few_shot,
    "base_to_new": base_to_new,
    "cross_dataset": cross_dataset,
    "domain_shift": domain_shift,
}
PROTOCOLS = OF_METHODS | OF_LEARNERS
# What a protocol decides itself, and the option that says it.
DECIDED = {
    "--data.seed": "--seeds",
    "--data.store": "--seeds, which repeat a draw",
    "--data.root": "--root",
    "--seed_everything": "--seeds",
    "--resume": "the same command again, which resumes",
}
DECIDED_OF_LEARNERS = DECIDED | {
    "--data.dataset": "--datasets",
    "--data.classes": "another protocol",
    "--data.shots": "--shots",
    "--report": "the last epoch, which a protocol reports",
    "--test": "one test after each training",
}
DECIDED_OF_METHODS = DECIDED | {
    "--data.task": "--tasks",
    "--data.dataset": "--tasks",
    "--data.train_on": "the protocol's splits",
    "--report": "the last epoch, or the papers' rules with --paper",
    "--test": "one test after the final training",
    "--figures": "one figure of all methods",
}


def run_protocol(arguments: list[str]) -> None:
    """Run the protocol of the command line and report it."""
    given = arguments[0] if arguments else ""
    if given in ("-h", "--help"):
        print(f"usage: python -m visionpeft.protocol {{{','.join(PROTOCOLS)}}} ...; each has its own --help")
        return
    if given not in PROTOCOLS:
        near = did_you_mean(given, PROTOCOLS) if given else f"; it can be {', '.join(PROTOCOLS)}"
        raise ConfigurationError(f"name the protocol first, not {given!r}{near}")
    output, chosen = (_of_methods if given in OF_METHODS else _of_learners)(given, arguments[1:])
    _check_output(output)
    try:
        rows = PROTOCOLS[given](**chosen, output=output)
    except (Interrupted, KeyboardInterrupt, SystemExit):  # Lightning leaves by SystemExit when a test is interrupted
        raise Interrupted(
            f"interrupted; finished cells and epochs are kept in {output}. Give the same command again to go on"
        ) from None
    report(given, rows, output)


def _check_output(output: Path) -> None:
    """Refuse a folder in which tables and figures would take the place of somebody else's files.

    Raises:
        ConfigurationError: it is one.
    """
    if output.exists() and not output.is_dir():
        raise ConfigurationError(f"--output {output} is a file; name a folder")
    made_here = ("protocol.json", "*/cell.json", "*/*/cell.json", "*/lock", "*/*/lock")
    if any(next(output.glob(pattern), None) for pattern in made_here):
        return
    if taken := [name for name in REPORT_FILES if (output / name).exists()]:
        raise ConfigurationError(
            f"{output} holds {taken[0]}, which no protocol wrote and this one would replace; name another --output"
        )


def _of_methods(protocol: str, arguments: list[str]) -> tuple[Path, dict]:
    parser = _parser(protocol, "Compare methods: hyper-parameters chosen on validation, final trainings, one test.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--configs", nargs="+", help="a configuration for each method")
    what.add_argument("--method", nargs="+", help="methods whose shipped configurations are taken, such as VPT; or all")
    parser.add_argument(
        "--tasks", nargs="+", help="tasks; else all in the root, or without one those that need no download"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="of the final trainings (1 2 3, or the paper's)")
    parser.add_argument(
        "--search",
        choices=["grid", "optuna", "none"],
        default="grid",
        help="how hyper-parameters are chosen on validation (grid); none leaves the configuration's",
    )
    parser.add_argument("--budget", type=int, default=BUDGET, help=f"Optuna's trials of a method on a task ({BUDGET})")
    parser.add_argument(
        "--learning_rates",
        nargs="+",
        type=float,
        help="learning rates to try in the place of every recipe's grid, so that all methods have the same trials",
    )
    parser.add_argument(
        "--paper", action="store_true", help="train and report by each paper's rule, and say so in the table"
    )
    options, further = _parse(parser, arguments, DECIDED_OF_METHODS)
    configs = options.configs or configs_of_methods(options.method, PREFIXES[protocol])
    decided = ("tasks", "seeds", "search", "budget", "paper", "root", "workers", "learning_rates")
    chosen = {key: getattr(options, key) for key in decided}
    return options.output or Path("runs") / protocol, {"configs": configs, "arguments": further, **chosen}


def _of_learners(protocol: str, arguments: list[str]) -> tuple[Path, dict]:
    parser = _parser(protocol, "Compare learners on CLIP.")
    parser.add_argument("--configs", nargs="+", required=True, help="a configuration for each learner")
    parser.add_argument("--datasets", nargs="+", help="data sets; of cross_dataset and domain_shift the targets")
    parser.add_argument("--source", help="data set on which cross_dataset and domain_shift train (clipart)")
    parser.add_argument(
        "--shots", nargs="+", type=int, help="training images of a class (few_shot: 1 2 4 8 16; else 16)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of draw and training (1 2 3)")
    options, further = _parse(parser, arguments, DECIDED_OF_LEARNERS)
    if options.root is not None:
        further += ["--data.root", options.root]
    chosen = {"configs": options.configs, "seeds": options.seeds, "arguments": further, "workers": options.workers}
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
    return options.output or Path("runs") / protocol, chosen


def _parser(protocol: str, description: str) -> argparse.ArgumentParser:
    parser = Options(
        f"python -m visionpeft.protocol {protocol}",
        description=f"{description} Finished cells are not trained again, interrupted ones are resumed; several "
        "processes and machines may work on one output at the same time.",
        epilog="Any further --config overlay, --model., --data. or --trainer. option is passed on to every training.",
        allow_abbrev=False,
    )
    parser.add_argument("--root", help="folder in which the data sets lie; embedded ones need none")
    parser.add_argument("--output", type=Path, help=f"folder of runs, tables and figures (runs/{protocol})")
    parser.add_argument(
        "--workers", type=workers, default=1, help="processes that train at the same time (1), or ray: a Ray cluster"
    )
    return parser


def workers(given: str) -> Workers:
    """The option `--workers`."""
    number = int(given) if given.isdecimal() else given
    try:
        check_workers(number)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return number


def _parse(
    parser: argparse.ArgumentParser, arguments: list[str], decided: dict[str, str]
) -> tuple[argparse.Namespace, list[str]]:
    options, further = parser.parse_known_args(arguments)
    return options, refuse_decided(further, decided)


def refuse_decided(further: list[str], decided: dict[str, str]) -> list[str]:
    """The further arguments of a command, none of which decides what the command itself decides.

    Args:
        further: the arguments.
        decided: for each of those options, what to use in its place.

    Raises:
        ConfigurationError: one does.
    """
    for argument in further:
        if (name := option_of(argument)) in decided:
            raise ConfigurationError(f"{argument.partition('=')[0]} is decided by the protocol; use {decided[name]}")
    return further
