"""The options of `fit`: those of a run, the page that `--help` prints, and the wrong ones that can be told at once.

Nothing here imports torch or Lightning. Whatever cannot be told from the sources is left to the real parser.
"""

import itertools
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from visionpeft.errors import ConfigurationError, did_you_mean
from visionpeft.runs.config_files import FOLDERS, config_content, shipped_configs
from visionpeft.runs.signatures import parameters, summary, trainer_parameters

CALIBRATION_BINS = 15  # of a run that says nothing else


@dataclass(frozen=True)
class Option:
    """An option that belongs to a run and not to model, data or trainer."""

    name: str
    type: Any
    default: Any
    help: str


OPTIONS = (
    Option("output", str, "runs", "folder in which the run directory is made"),
    Option("resume", str, None, "run directory of an interrupted run to continue"),
    Option(
        "report",
        Literal["last", "best", "best_test"],
        "last",
        "which epoch is tested and kept: the last, or the best on the validation split; best_test selects on the test "
        "split, as some papers did, and the results say so",
    ),
    Option(
        "global_batch",
        int,
        None,
        "images of one step over all devices, of which each gets its share; in the place of --data.batch_size, which "
        "is that of one device",
    ),
    Option(
        "stage_epochs",
        list[int] | None,
        None,
        "of a method that is trained in stages, the epochs of each training before the last; by default all are as "
        "long as the last, which --trainer says",
    ),
    Option("test", bool, True, "test once, after training; false while hyper-parameters are chosen"),
    Option(
        "calibration_bins",
        int,
        CALIBRATION_BINS,
        "bins of the expected calibration error, which is larger with more of them; 20 in the code of C-TPT",
    ),
    Option("figures", bool, True, "draw what the run has seen and mistaken"),
)
SEED = Option("seed_everything", int, 0, "seed of weights, order and augmentation")
CONFIG = Option("config", str, None, "a path, or the name of a shipped configuration")
OF_PARSERS = ("help", "print_config", "print_shtab")  # jsonargparse has them in every parser
PROGRAM = "python -m visionpeft.fit"
WHOLE_PAGE = ["--help", "all"]
OTHER_WORDS = {"epochs": "max_epochs", "steps": "max_steps", "learning_rate": "lr"}  # of other command lines
SECTIONS = ("model", "data", "trainer")
TASKS = (
    *("ImageClassification", "ObjectDetection", "OpenVocabularySegmentation", "PromptLearning"),
    *("SemanticSegmentation", "VideoClassification"),
)


def answer_at_once(arguments: list[str]) -> bool:
    """Print the help page if that is all that was asked for, and refuse an option that no class has.

    Args:
        arguments: the command line without the program's name.

    Returns:
        Whether the command has been answered.

    Raises:
        ConfigurationError: an option does not exist, or has no value.
    """
    if arguments in (["--help"], ["-h"]):
        print(help_page())
        return True
    _refuse_without_value(arguments)
    if not any(argument.startswith("--resume") for argument in arguments):  # its configuration comes from that run
        _refuse_unknown(arguments)
    return False


def help_page() -> str:
    """What `--help` prints: how a command is made, and the names of what can be set."""
    lines = [
        f"usage: {PROGRAM} --config NAME [--config NAME ...] [--OPTION VALUE ...]",
        "",
        "Train, test once, and leave everything in a run directory. A configuration names classes of model and data;",
        "options after it set what they take, such as --model.method.num_tokens 50 or --data.batch_size 32.",
        "",
    ]
    for option in (CONFIG, SEED, *OPTIONS):
        default = "" if option.default is None else f" (default: {str(option.default).lower()})"
        lines += _filled(f"--{option.name}: {option.help}{default}".split())
    for task in TASKS:
        lines += ["", f"--model {task}", *_filled(summary(task).split())]
        lines += _filled(f"--model.{name}" for name in parameters(task) or ())
    lines += ["", "Lightning's Trainer", *_filled(f"--trainer.{name}" for name in trainer_parameters() or ())]
    lines += ["", "Shipped configurations", *_filled(_grouped(shipped_configs()))]
    lines += ["", "Types, defaults and meaning: --model.help CLASS, --data.help CLASS, and --help all for the rest."]
    return "\n".join(lines)


def _grouped(names: list[str]) -> Iterator[str]:
    """Names that share a folder in one: vtab_{lora,vpt}.yaml."""
    groups: dict[str, list[str]] = {}
    for name in names:
        prefix = next((prefix for prefix in FOLDERS if name.startswith(f"{prefix}_")), name)
        groups.setdefault(prefix, []).append(name.removeprefix(f"{prefix}_").removesuffix(".yaml"))
    for prefix, stems in groups.items():
        yield prefix if prefix in names else f"{prefix}_{{{', '.join(stems)}}}.yaml"


def _filled(words: Iterable[str]) -> list[str]:
    indents = {"initial_indent": "  ", "subsequent_indent": "  "}
    return textwrap.wrap(" ".join(words), 100, **indents, break_long_words=False, break_on_hyphens=False)


def unknown_option(
    owner: str, option: str, allowed: Iterable[str], nested: dict[str, Iterable[str]] | None = None
) -> str:
    """The sentence about an option that does not exist.

    Args:
        owner: what was asked for it: a class, "trainer", or one of a class's dataclasses, as "VPT.blocks".
        option: its name.
        allowed: what there is.
        nested: names inside each of the owner's dataclasses, in which it may have been meant.
    """
    meant = [f"{outer}.{option}" for outer, inner in (nested or {}).items() if option in inner]
    near = f"; did you mean {meant[-1]}?" if meant else did_you_mean(option, allowed)
    return f"{owner} has no option {option!r}{near}"


def _refuse_without_value(arguments: list[str]) -> None:
    """Refuse an option of a section at whose place of a value there is nothing, or the next option.

    The parser would name the section alone.
    """
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        section, *path = argument.removeprefix("--").split(".")
        if not argument.startswith("--") or section not in SECTIONS or not path or "=" in argument:
            continue
        if path[-1] != "help" and (following is None or following.startswith("--")):
            raise ConfigurationError(f"option {argument} needs a value after it: {argument} ...")


def _refuse_unknown(arguments: list[str]) -> None:
    given = list(named_options(arguments))
    configs = [config_content(value) for name, value in given if name in ("c", "config") and value is not None]
    own = {CONFIG.name, SEED.name, *(option.name for option in OPTIONS), *OF_PARSERS}
    for name, _ in given:
        section, *path = name.split(".")
        if section == "trainer":
            allowed = trainer_parameters()
            if path and allowed is not None and path[0] not in allowed:
                raise ConfigurationError(unknown_option("trainer", path[0], allowed))
        elif section in SECTIONS:
            _refuse_of_class(section, path, given, configs)
        elif section not in own | {"c", "h"}:
            meant = _meant(section, given, configs)
            near = f"; did you mean {meant}?" if meant else did_you_mean(section, own | set(SECTIONS))
            raise ConfigurationError(f"there is no option {name!r}{near}")


def _meant(word: str, given: list[tuple[str, str | None]], configs: list) -> str | None:
    """The options of trainer, data and model, and of what these are made of, whose last word is this one."""
    word = OTHER_WORDS.get(word, word)
    found = [f"--trainer.{word}"] if word in (trainer_parameters() or ()) else []
    for section in ("data", "model"):
        for owner in _named([section], given, configs)[-1:]:
            own = {name: cls for name, cls in (parameters(owner) or {}).items() if cls != "ImageSet"}  # no option
            inner = {name: _named([section, name], given, configs)[-1:] or [own[name]] for name in own}
            nested = [f"--{section}.{name}.{word}" for name, (cls,) in inner.items() if word in (parameters(cls) or ())]
            found += [f"--{section}.{word}"] if word in own else nested
    return " or ".join(found) or None


def named_options(arguments: list[str]) -> Iterator[tuple[str, str | None]]:
    """Names of the options on the command line, without dashes and `init_args`, and their values."""
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        if argument.startswith("-") and argument.lstrip("-")[:1].isalpha():
            name, equals, value = argument.lstrip("-").partition("=")
            parts = [part for part in name.rstrip("+").split(".") if part != "init_args"]
            yield ".".join(parts), value if equals else following


def _refuse_of_class(section: str, path: list[str], given: list[tuple[str, str | None]], configs: list) -> None:
    """Follow an option through the classes which configurations and command line name for each of its parts."""
    reached = [section]
    if path and path[0] not in ("class_path", "help") and not configs and not _named(reached, given, configs):
        raise ConfigurationError(
            f"--{'.'.join([section, *path])}: name a configuration, such as --config images_lora.yaml for images of "
            f"your own; the {section} comes from it"
        )
    owners = {name: parameters(name) for name in _named(reached, given, configs)}
    for part in path:
        if not owners or None in owners.values() or part in ("class_path", "help"):
            return  # known only after parsing, or a class of the user's
        holding = {owner: each[part] for owner, each in owners.items() if part in each}
        if not holding:
            owner, allowed = list(owners.items())[-1]
            inner = {name: parameters(annotation) or () for name, annotation in allowed.items()}
            raise ConfigurationError(unknown_option(owner, part, allowed, inner))
        reached.append(part)
        owners = {name: parameters(name) for name in _named(reached, given, configs)}
        owners = owners or {f"{owner}.{part}": parameters(annotation) for owner, annotation in holding.items()}


def _named(path: list[str], given: list[tuple[str, str | None]], configs: list) -> list[str]:
    """Every class that is named for an argument, in configurations and then on the command line."""
    option = ".".join(path)
    names = [value for name, value in given if name in (option, f"{option}.class_path") and value is not None]
    return [*filter(None, (_class_path(content, path) for content in configs)), *names]


def _class_path(content: Any, path: list[str]) -> str | None:
    for part in path:
        if not isinstance(content, dict):
            return None
        content = content[part] if part in content else (content.get("init_args") or {}).get(part)
    if isinstance(content, dict):
        return content.get("class_path")
    return None if content is None else str(content)
