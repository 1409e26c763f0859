"""The command line: how a configuration is found, parsed and refused, and how errors are shown."""

import copy
from enum import Enum
from pathlib import Path

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import ActionConfigFile, Namespace
from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from visionpeft import data, heads, methods
from visionpeft.clip import learners
from visionpeft.data import ImageDataModule
from visionpeft.data.few_shot.definitions import is_embedded
from visionpeft.errors import ConfigurationError, DataError, UserError
from visionpeft.runs.carried import with_carried
from visionpeft.runs.config_files import config_content
from visionpeft.runs.explain import explain, missing_package, refused_when_built, user_error
from visionpeft.runs.option_values import as_meant, refuse_nulls
from visionpeft.runs.options import CONFIG, OPTIONS, PROGRAM, SEED, WHOLE_PAGE, named_options
from visionpeft.runs.processes import check_devices, share_of_batch
from visionpeft.runs.sharding import check_sharding
from visionpeft.runs.trainer import Trainer
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.tasks import (
    ImageClassification,
    ImageTask,
    ObjectDetection,
    OpenVocabularySegmentation,
    PromptLearning,
    SemanticSegmentation,
    VideoClassification,
)

CLASSES = [
    ImageClassification,
    ObjectDetection,
    OpenVocabularySegmentation,
    PromptLearning,
    SemanticSegmentation,
    VideoClassification,
    *(
        value
        for module in (learners, data, heads, methods, pl.callbacks, pl.loggers)
        for value in vars(module).values()
        if isinstance(value, type)
    ),
]

# Options of the model that are taken from the data, with what they are where nobody gives them.
LINKED = {"labels": "classes", "class_names": None, "tasks": None}

# Options of the data that say where they are.
PLACES = {"root", "train", "val", "test", "generated_views", "folder", "image_folder", "split_file", "store", "sbd"}

register_type(torch.device)  # a device of a callback, which is to be read again from the configuration of the run


class ConfigFile(ActionConfigFile):
    """A path, or the name of a shipped configuration. A file in the working directory wins."""

    def __call__(self, parser, namespace, value, option_string=None):
        """Find the configuration and read it; classes are named without their modules, which may have moved."""
        content = _short_names(config_content(value))
        if isinstance(content, dict):  # that of a run names adapters of which it has copies
            content = with_carried(content, RunDirectory(Path(value).parent).carried)
        content = yaml.safe_dump(content, sort_keys=False)
        super().__call__(parser, namespace, content, option_string)


def _short_names(content: object) -> object:
    """A configuration in which classes of ours are named by their names alone, as one of an older version is read."""
    if isinstance(content, list):
        return [_short_names(each) for each in content]
    if not isinstance(content, dict):
        return content
    content = {key: _short_names(value) for key, value in content.items()}
    if isinstance(content.get("class_path"), str):
        content["class_path"] = without_module(content["class_path"])
    return content


def without_module(path: str) -> str:
    """The name alone of a class of ours that is named with its module, which may have moved; another path as it is."""
    module, _, name = path.rpartition(".")
    return name if module.partition(".")[0] == "visionpeft" and name in {cls.__name__ for cls in CLASSES} else path


class Parser(LightningArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str, ex: Exception | None = None):
        """Raise what the user can act on."""
        if not self.exit_on_error:  # nested parsers try alternatives
            super().error(message, ex)
        raise user_error(ex) or ConfigurationError(explain(message, self, CLASSES)) from ex


class CLI(LightningCLI):
    """Parse `--config`, `--model.*`, `--data.*` and `--trainer.*`, and build task, data and trainer.

    Args:
        arguments: the command line without the program's name.
    """

    def __init__(self, arguments: list[str]):
        self.arguments = ["--help"] if arguments == WHOLE_PAGE else arguments
        super().__init__(
            ImageTask,
            ImageDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=None,
            trainer_class=Trainer,
            parser_class=Parser,
            parser_kwargs={"allow_abbrev": False, "prog": PROGRAM, "description": None},
            run=False,
        )

    def init_parser(self, **kwargs) -> Parser:
        """LightningCLI's parser, with configurations found by name."""
        parser = self.parser_class(**kwargs)
        parser.add_argument("-c", "--config", action=ConfigFile, help=CONFIG.help)
        return parser

    def add_default_arguments_to_parser(self, parser: Parser) -> None:
        """The seed."""
        parser.add_argument(f"--{SEED.name}", type=SEED.type, default=SEED.default, help=SEED.help)

    def add_arguments_to_parser(self, parser: Parser) -> None:
        """What belongs to a run and not to model, data or trainer."""
        for option in OPTIONS:
            parser.add_argument(f"--{option.name}", type=option.type, default=option.default, help=option.help)
        parser.link_arguments("data.class_names", "model.init_args.class_names", apply_on="instantiate")
        parser.link_arguments("data.labels", "model.init_args.labels", apply_on="instantiate")
        parser.link_arguments("data.tasks", "model.init_args.tasks", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.set_defaults(
            {"trainer.num_sanity_val_steps": 0, "trainer.enable_model_summary": False, "trainer.devices": 1}
        )

    def parse_arguments(self, parser: Parser, args) -> None:
        """Parse this CLI's arguments; `--resume RUN` starts from the configuration of that run."""
        self.config = self.parsed(_with_resumed_config(self.arguments))
        for part in ("model", "data"):
            refuse_nulls(self.config[part])
        if not 0 <= self.config.seed_everything < 2**32:
            raise ConfigurationError(
                f"--seed_everything {self.config.seed_everything} must be from 0 to {2**32 - 1}, as NumPy takes seeds"
            )
        if self.config.calibration_bins < 1:
            raise ConfigurationError(f"--calibration_bins {self.config.calibration_bins} must be at least 1")
        self._check_root()

    def parsed(self, arguments: list[str]) -> Namespace:
        """What a command line says of all options."""
        return self.parser.parse_args(as_meant(arguments))

    def _check_root(self) -> None:
        """Refuse a root for images that are in the package, unless these were asked for by name."""
        named = {argument.partition("=")[0] for argument in self.arguments}
        options = self.config.data.init_args if self.config.data is not None else Namespace()
        if "--data.root" not in named or "--data.dataset" in named or "dataset" not in options:
            return
        if self.config.data.class_path.rpartition(".")[2] == "FewShot" and is_embedded(str(options.dataset)):
            raise ConfigurationError(
                f"--data.root {options.root} would not be read: the configuration has the embedded data set "
                f"'{options.dataset}'; for images of your own, {options.root}/<class>/*.jpg, add --data.dataset folder"
            )

    def _check_linked(self, datamodule: ImageDataModule) -> None:
        """Refuse options of the model that come from elsewhere, if they say something else."""
        named, options = dict(named_options(self.arguments)), self.config.model.init_args
        for name, usual in LINKED.items():
            wanted, own = options.get(name), getattr(datamodule, name)
            said = wanted is not None and (wanted != usual or f"model.{name}" in named)
            if said and wanted != own:
                shown = f"'[{', '.join(map(str, wanted))}]'" if isinstance(wanted, list) else wanted
                raise ConfigurationError(
                    f"--model.{name} {shown} comes from the data, which has {own}: give --data.{name} {shown}, or "
                    "leave it out"
                )
        if named.get("model.seed", str(self.config.seed_everything)) != str(self.config.seed_everything):
            raise ConfigurationError(f"--model.seed is that of the run: give --seed_everything {named['model.seed']}")

    def _check_fractions(self, datamodule: ImageDataModule) -> None:
        """Refuse shares for a division at random where splits are folders or files, or a few-shot set has its own."""
        options, about = self.config.data.init_args, datamodule.images.about
        named = {name.removeprefix("data.") for name, _ in named_options(self.arguments)}
        split = str(about.get("split")).rpartition(" ")[2]
        for name in [name for name in ("val_fraction", "test_fraction", "split_seed") if name in named]:
            if about.get("dataset") == "FewShot" and about["task"] != "folder":
                raise ConfigurationError(
                    f"--data.{name} {options.get(name)} would not be used: it divides --data.dataset folder, and "
                    f"'{about['task']}' has splits of its own; leave it out"
                )
            if split in ("folders", "files"):
                raise ConfigurationError(
                    f"--data.{name} {options.get(name)} would not be used: {options.get('root')} has {split} of splits "
                    f"({', '.join(datamodule.sources)}), which are taken as they are; leave it out, or add a "
                    f"{split[:-1]} for what is missing"
                )

    def before_instantiate_classes(self) -> None:
        """Refuse a missing accelerator before anything is built."""
        accelerator = self.config.trainer.accelerator
        if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            raise ConfigurationError(
                f"--trainer.accelerator {accelerator} was asked for, but this machine has no usable CUDA GPU; "
                "leave it out (auto) or use cpu"
            )

    def instantiate_classes(self) -> None:
        """Build data and task; the trainer is built by `build_trainer`."""
        try:
            self.config_init = self.parser.instantiate_classes(self.config)
            self._check_linked(self.config_init.data)
            self._check_fractions(self.config_init.data)
            self.config_init.model.connect(self.config_init.data)
        except Exception as error:
            meant = user_error(error) or missing_package(error) or refused_when_built(error)
            if meant is None:
                raise
            raise self._placed(meant) from None
        self.datamodule: ImageDataModule = self.config_init.data
        self.model: ImageTask = self.config_init.model
        # wrong options are refused before a run exists
        self.trainer = self.build_trainer([], logger=False, enable_checkpointing=False)
        check_devices(self.trainer)
        check_sharding(self.trainer, self.model)
        if self.config.global_batch is not None:
            self.datamodule.batch_size = share_of_batch(self.config.global_batch, self.trainer)

    def _placed(self, error: UserError) -> UserError:
        """An error of the data, with what to do where a run names them by a path that is not here."""
        runs = [Path(value).parent for name, value in named_options(self.arguments) if name == "config" and value]
        runs += [Path(self.config.resume)] if self.config.resume is not None else []
        run = next((each for each in runs if (each / "environment.json").is_file()), None)
        named, options = dict(named_options(self.arguments)), vars(self.config.data.init_args)
        gone = [
            (name, value)
            for name, value in options.items()
            if name in PLACES and f"data.{name}" not in named and isinstance(value, str) and value in str(error)
        ]
        if run is None or not isinstance(error, DataError) or not gone:
            return error
        name, value = gone[0]
        if Path(value).is_absolute() or Path(value).exists():
            return error
        return DataError(
            f"{error}; in {run} it is a path from the folder in which that was begun: go there, or say where it is now "
            f"with --data.{name}"
        )

    def build_trainer(self, callbacks: list[pl.Callback], *, of_stage: bool = False, **own) -> pl.Trainer:
        """Lightning's Trainer with the options given under `trainer`, and ours.

        Args:
            callbacks: ours.
            of_stage: whether another training follows with the callbacks given, which then begin anew: this one has
                copies of them, and no logger but its own.
            own: further options, which win.
        """
        given = dict(self.config_init.trainer)
        before = given.pop("callbacks", None) or []
        if of_stage:
            before = copy.deepcopy(before)
            given["logger"] = None
        callbacks = [*(before if isinstance(before, list) else [before]), *callbacks]
        if own.get("logger") and isinstance(given["logger"], Logger | list):
            further = given["logger"] if isinstance(given["logger"], list) else [given["logger"]]
            own["logger"] = [own["logger"], *further]
        try:
            return Trainer(**given | own, callbacks=callbacks)
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise ConfigurationError(f"trainer: {error}") from error

    def config_text(self) -> str:
        """The resolved configuration as YAML, which is enough to build task and data again."""
        return self.parser.dump(self._resolved(), skip_none=False, skip_validation=True)

    def _resolved(self) -> Namespace:
        """The configuration without what a run is started with alone."""
        config = self.config.clone()
        for key in ("config", "resume"):
            config.pop(key, None)
        return _plain(config)


def _plain(value: object) -> object:
    """A value of the configuration with the members of enumerations as what YAML knows."""
    if isinstance(value, Namespace):
        return Namespace(**{key: _plain(each) for key, each in vars(value).items()})
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.value if isinstance(value, Enum) else value


def _with_resumed_config(arguments: list[str]) -> list[str]:
    for index, argument in enumerate(arguments):
        if argument.startswith("--resume"):
            path = argument.partition("=")[2] or "".join(arguments[index + 1 : index + 2])
            return ["--config", str(RunDirectory.existing(path).config), *arguments]
    return arguments
