"""Limits of the Trainer that leave no batch of what is to be trained on or tested."""

from pathlib import Path

from visionpeft.errors import ConfigurationError
from visionpeft.runs.cli import CLI
from visionpeft.runs.options import named_options
from visionpeft.sharing.run_directory import RunDirectory

NOTHING = {
    "limit_train_batches": "nothing to train on; to test without training use --trainer.max_epochs 0",
    "limit_test_batches": "nothing to test; to train without a test use --test false",
}


def check_limits(cli: CLI, *names: str, tested: RunDirectory | None = None) -> None:
    """Refuse a number of batches that is 0; where the configuration of a run says so, with the line to be changed.

    Shares of all batches, such as 0.5, were once written as 0 there, of which nobody can say what they had been.

    Args:
        cli: the command line.
        names: the limits that have to leave something.
        tested: the finished run that is tested again, of which there is one.

    Raises:
        ConfigurationError: one leaves nothing.
    """
    for name in names:
        limit = cli.config.trainer.get(name)
        if limit is None or isinstance(limit, bool) or limit != 0:
            continue
        nothing = NOTHING[name] if tested is None else "nothing to test; leave it out"
        file = tested.config if tested is not None else _config_of_run(cli)
        if file is None or f"trainer.{name}" in dict(named_options(cli.arguments)):
            raise ConfigurationError(f"--trainer.{name} 0 leaves {nothing}")
        raise ConfigurationError(
            f"{file} says {name}: 0, which leaves {nothing.partition(';')[0]}; if a share such as 0.5 was given, an "
            f"older version wrote it as 0: write the share in that line, or give --trainer.{name} 0.5 (1.0 is all)"
        )


def _config_of_run(cli: CLI) -> Path | None:
    """The configuration of a run that a command line resumes, or begins with; None if it does neither."""
    if cli.config.resume is not None:
        return RunDirectory(Path(cli.config.resume)).config
    named = [Path(value) for name, value in named_options(cli.arguments) if name == "config" and value]
    return next((each for each in named if (each.parent / "environment.json").is_file()), None)
