"""`python -m visionpeft.search --space noah --budget 200`: which methods, of which size, in which blocks."""

from pathlib import Path

from visionpeft.errors import ConfigurationError
from visionpeft.protocols.method_protocols import SEEDS
from visionpeft.protocols.protocol import DECIDED_OF_METHODS, refuse_decided, workers
from visionpeft.runs.command import Interrupted, Options
from visionpeft.searching.report import REPORT_FILES, report
from visionpeft.searching.spaces import SPACES, make_space
from visionpeft.searching.study import BASE, BUDGET, search


def run_search(arguments: list[str]) -> None:
    """Search as the command line says, and report."""
    parser = Options(
        "python -m visionpeft.search",
        description="Find a composition of methods: judge members of a space on validation, train the best again for "
        "each seed, test it once. Finished parts are not done again, interrupted ones are resumed; several processes "
        "and machines may work on one output at the same time.",
        epilog="Any further --config overlay, --model., --data. or --trainer. option is passed on to every training.",
        allow_abbrev=False,
    )
    parser.add_argument("--space", required=True, help=f"what is searched: {', '.join(SPACES)}")
    parser.add_argument("--space_options", help="options of the space as YAML, such as '{sizes: [1, 4, 16]}'")
    parser.add_argument("--budget", type=int, default=BUDGET, help=f"members that are judged on each task ({BUDGET})")
    parser.add_argument("--max_parameters", type=int, help="most values that a member may train outside the head")
    parser.add_argument(
        "--search_epochs", type=int, help="epochs of the supernet or of each trial (as of the final training)"
    )
    parser.add_argument("--base", default=BASE, help=f"configuration whose method is replaced ({BASE})")
    parser.add_argument("--tasks", nargs="+", help="tasks of its benchmark; else all that are there")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of the final trainings (1 2 3)")
    parser.add_argument("--against", nargs="+", default=[], help="methods, or their configurations, to compare with")
    parser.add_argument("--root", help="folder in which the data sets lie; embedded ones need none")
    parser.add_argument("--output", type=Path, help="folder of runs, tables and figure (runs/search-SPACE)")
    parser.add_argument("--workers", type=workers, default=1, help="processes at the same time (1), or ray")
    options, further = parser.parse_known_args(arguments)
    space = make_space(options.space, options.space_options)
    output = options.output or Path("runs") / f"search-{space.name}"
    _check_output(output)
    names = ("base", "tasks", "seeds", "budget", "max_parameters", "search_epochs", "against", "root", "workers")
    chosen = {name: getattr(options, name) for name in names}
    try:
        judged, rows = search(space, **chosen, output=output, arguments=refuse_decided(further, DECIDED_OF_METHODS))
    except (Interrupted, KeyboardInterrupt, SystemExit):  # Lightning leaves by SystemExit when it is interrupted
        raise Interrupted(
            f"interrupted; finished trials and epochs are kept in {output}. Give the same command again to go on"
        ) from None
    report(space.name, judged, rows, output)


def _check_output(output: Path) -> None:
    """Refuse a folder in which the report would take the place of somebody else's files.

    Raises:
        ConfigurationError: it is one.
    """
    if output.exists() and not output.is_dir():
        raise ConfigurationError(f"--output {output} is a file; name a folder")
    if (output / "search.json").exists():
        return
    if taken := [name for name in (*REPORT_FILES, "protocol.json", "final") if (output / name).exists()]:
        raise ConfigurationError(
            f"{output} holds {taken[0]}, which no search wrote and this one would replace; name another --output"
        )
