"""Further arguments of a protocol, which go to every training and must not replace what it compares."""

from collections.abc import Mapping, Sequence

from visionpeft.errors import ConfigurationError
from visionpeft.runs.config_files import config_content


def split_overlays(arguments: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Configurations among further arguments, which come before recipes, and the others, which come after."""
    overlays, given, rest = [], [], list(arguments)
    while rest:
        part = rest.pop(0)
        if part in ("--config", "-c") and rest:
            overlays += [part, rest.pop(0)]
        elif part.startswith("--config="):
            overlays.append(part)
        else:
            given.append(part)
    return tuple(overlays), tuple(given)


def overlays_of(arguments: Sequence[str]) -> list[str]:
    """Names of the configurations among further arguments."""
    overlays, _ = split_overlays(arguments)
    return [each.removeprefix("--config=") for each in overlays if each not in ("--config", "-c")]


def decided_by_protocol(configs: Sequence[str], settings: Mapping[str, str]) -> list[str]:
    """Arguments for what a protocol decides, where a configuration says something else.

    Args:
        configs: all configurations of a training.
        settings: what is decided, of the options at the top of a configuration.
    """
    contents = [content for config in configs if isinstance(content := config_content(config), dict)]
    said = {
        option
        for each in contents
        for option in settings
        if str(each.get(option, settings[option])).lower() != settings[option]
    }
    return [part for option in settings if option in said for part in (f"--{option}", settings[option])]


def option_of(argument: str) -> str:
    """The option that an argument sets: "--data.seed" of `--data.init_args.seed=1`, too."""
    return argument.partition("=")[0].replace(".init_args", "")


def refuse_replaced(part: str, arguments: Sequence[str], instead: str, fields: bool = False) -> None:
    """Refuse arguments that would train another method or learner than the one whose name a table has.

    Args:
        part: of the model: "method" or "learner".
        arguments: further arguments of `visionpeft.fit`.
        instead: what names it here.
        fields: whether its fields are decided, too.

    Raises:
        ConfigurationError: an option or a configuration among them names one.
    """
    _, given = split_overlays(arguments)
    option = f"--model.{part}"
    for argument in given:
        name = option_of(argument)
        if name == option or (fields and name.startswith(f"{option}.")):
            raise ConfigurationError(f"{argument.partition('=')[0]} is decided by the protocol; use {instead}")
    for config in overlays_of(arguments):
        content = config_content(config)
        model = content.get("model") if isinstance(content, dict) else None
        said = {**model, **(model.get("init_args") or {})}.get(part) if isinstance(model, dict) else None
        if said is not None and (fields or not isinstance(said, dict) or "class_path" in said):
            raise ConfigurationError(
                f"{config} names a {part}, which would take the place of every one that is compared; use {instead}, "
                "and leave it out of --config"
            )
