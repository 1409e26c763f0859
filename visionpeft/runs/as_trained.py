"""What may be changed where a finished run is tested again, and what is as it was trained."""

from visionpeft.clip import learners
from visionpeft.clip.learner import Learner
from visionpeft.errors import ConfigurationError
from visionpeft.runs.cli import CLI
from visionpeft.runs.config_files import config_content
from visionpeft.runs.options import OPTIONS, named_options
from visionpeft.runs.resuming import changes, shown
from visionpeft.sharing.run_directory import RunDirectory

# Options of the tasks by what they are once a run has finished: brought along by the adapter or learner that is loaded,
TRAINED = {"method", "head", "learner", "train", "start", "template", "masks", "loss"}
# of no use without gradient steps,
OF_TRAINING = {
    *("optimisation", "drop_path", "dropout", "label_smoothing", "mixup", "cutmix", "head_init", "head_std"),
    *("class_weights", "positive_weights", "asymmetry"),
}
# and those that say on what, and how, it is tested.
OF_TEST = {
    *("backbone", "pretrained", "checkpoint", "backbone_kwargs", "class_names", "labels", "tasks", "seed"),
    *("window", "stride", "attention", "residual", "mlp", "threshold", "scale", "names", "num_frames", "interpolate"),
    *("cache", "cache_mib", "cache_features", "chunk_size", "class_token_only", "compile", "recompute"),
}

OF_A_RUN_AND_A_TEST = {"calibration_bins"}


class TestedAgain(CLI):
    """The command line of a finished run's configuration with changes for another test.

    Args:
        run: its directory.
        arguments: the changes.

    Raises:
        ConfigurationError: a change, on the command line or in a configuration, of what was trained; or an option on
            the command line that a test has no use for. What a configuration says of the training is left aside.
    """

    def __init__(self, run: RunDirectory, arguments: list[str]):
        self.run, self.given, self.starts = run, arguments, _starts(run)
        left_out = [part for name in self.starts for part in (f"--model.learner.{name}", "null")]
        super().__init__(["--config", str(run.config), *left_out, *arguments])

    def before_instantiate_classes(self) -> None:
        """Look at the changes before anything is built."""
        super().before_instantiate_classes()
        named = [name.split(".") for name, _ in named_options(self.given)]
        for option in OPTIONS:
            if [option.name] in named and option.name not in OF_A_RUN_AND_A_TEST:
                raise ConfigurationError(
                    f"--{option.name} is an option of a training and changes nothing about a test of {self.run.path}; "
                    "leave it out"
                )
        for path, before, now in changes(self, self.run):
            section, *parts = path
            if section != "model" or (parts[:1] == ["learner"] and parts[-1] in self.starts and now is None):
                continue
            what = f"--model.{'.'.join(parts)} {shown(now)}" if parts else f"--model {shown(now)}"
            if not parts:
                raise ConfigurationError(
                    f"{what}: {self.run.path} was trained by {shown(before)}, and is tested by it; leave it out"
                )
            if parts[0] in TRAINED:
                if parts == ["loss"] and before is None:  # where nobody has given one, the labels have said which
                    before = self.run.read_results().get("objective", {}).get("loss")
                if before == now:
                    continue
                folder = "learner" if self.run.learner.is_dir() else "adapter"
                of = "" if parts[0] == folder else f"of the {folder} "
                known = "" if before is None else f" ({shown(before)})"
                raise ConfigurationError(
                    f"{what}: the {parts[0]} is that {of}in {self.run.path}, as trained{known}; leave it out"
                )
            if parts[0] in OF_TRAINING and ["model", parts[0]] in [each[:2] for each in named]:
                raise ConfigurationError(
                    f"{what} is an option of a training and changes nothing about a test of {self.run.path}; leave it "
                    "out"
                )


def _starts(run: RunDirectory) -> list[str]:
    """Options that told a learner where its first values are: the run holds them, and they may be there no longer."""
    match config_content(str(run.config)):
        case {"model": {"init_args": {"learner": {"class_path": str(path), "init_args": dict(options)}}}}:
            learner = getattr(learners, path.rpartition(".")[2], Learner)
            return [name for name in learner.started_from if options.get(name) is not None]
    return []
