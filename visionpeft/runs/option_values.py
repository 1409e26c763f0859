"""Values of options as they are meant where jsonargparse reads another: nothing, and templates of texts."""

import contextlib
import dataclasses
import inspect
import json
import pydoc
import types
import typing

import yaml
from jsonargparse import Namespace

from visionpeft.errors import ConfigurationError

NULLS = ("null", "Null", "NULL", "~")  # YAML's words for nothing
TEXTS = ("template", "init")  # of which "{}" and "a map: a {}" are texts and no dictionaries
DICTIONARIES = ("backbone_kwargs", "overrides")


def as_meant(arguments: list[str]) -> list[str]:
    """Arguments in which `--model.method.alpha null` is `--model.method {"alpha": null}`, and a template is a text.

    Of null for an option of an option, jsonargparse makes the word "None", which a number refuses and a text takes for
    a text: findings/jsonargparse_null_of_an_option_of_an_option_is_the_word_none.sh. A text that is a dictionary in
    YAML, as the template {} is, it refuses.

    Raises:
        ConfigurationError: an entry of a dictionary is given by itself, of which jsonargparse would make a text.
    """
    rest, result = list(arguments), []
    while rest:
        argument = rest.pop(0)
        option, equals, value = argument.partition("=")
        rewritten = _rewritten(option, value if equals else next(iter(rest), ""))
        if rewritten is not None and not equals:
            rest.pop(0)
        result += [argument] if rewritten is None else rewritten
    return result


def _rewritten(option: str, value: str) -> list[str] | None:
    """An option of model or data as a dictionary, where its value would be read otherwise than is meant; else None."""
    root, *parts = [part for part in option.removeprefix("--").split(".") if part != "init_args"]
    if not option.startswith("--") or root not in ("model", "data") or not parts:
        return None
    for name in DICTIONARIES:
        if name in parts[:-1]:
            whole = option.partition(f".{name}.")[0] + f".{name}"
            raise ConfigurationError(f"option {name} is given as a whole: {whole} '{{{parts[-1]}: {value}}}'")
    null = value in NULLS and len(parts) > 1
    if not null and not _is_text(parts[-1], value):
        return None
    outer, inner = (f"--{root}.{parts[0]}", parts[1:]) if len(parts) > 1 else (f"--{root}", ["init_args", *parts])
    content = None if null else value
    for part in reversed(inner):
        content = {part: content}
    return [outer, json.dumps(content)]


def refuse_nulls(given: Namespace | None) -> None:
    """Refuse `null` for what takes none, which jsonargparse lets through.

    Args:
        given: `class_path` and `init_args` of a class.

    Raises:
        ConfigurationError: an option is null whose annotation does not admit None.
    """
    if given is not None:
        _refuse_nulls(pydoc.locate(given.class_path), given.init_args, "")


def _refuse_nulls(cls: type | None, options: Namespace, where: str) -> None:
    hints, defaults = _parameters(cls)
    for name, value in vars(options).items():
        hint = hints.get(name, typing.Any)
        # Null is also what stands for a value that is linked to another option's, and such have no default.
        has_default = defaults.get(name) not in (None, inspect.Parameter.empty)
        if value is None and has_default and _takes_no_none(hint):
            raise ConfigurationError(f"option {where}{name} takes no null; leave it out for its default")
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Namespace) and "class_path" in each:
                _refuse_nulls(pydoc.locate(each.class_path), each.get("init_args", Namespace()), f"{where}{name}.")
            elif isinstance(each, Namespace):
                for member in filter(dataclasses.is_dataclass, (hint, *typing.get_args(hint))):
                    _refuse_nulls(member, each, f"{where}{name}.")


def _parameters(cls: type | None) -> tuple[dict[str, object], dict[str, object]]:
    """Annotations and defaults of a constructor; those that it passes on are those of its base classes."""
    hints, defaults = {}, {}
    for base in reversed(inspect.getmro(cls)) if inspect.isclass(cls) else ():
        if "__init__" in vars(base) and base is not object:
            own = inspect.signature(base.__init__).parameters
            hints |= dict.fromkeys(own, typing.Any)
            defaults |= {name: each.default for name, each in own.items()}
            with contextlib.suppress(Exception):  # annotations of a user's class that cannot be evaluated say nothing
                hints |= typing.get_type_hints(base.__init__)
    return hints, defaults


def _takes_no_none(hint: object) -> bool:
    """Whether an annotation is known not to admit None."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return all(_takes_no_none(member) for member in typing.get_args(hint))
    if origin is typing.Literal:
        return None not in typing.get_args(hint)
    kind = hint if origin is None else origin
    return isinstance(kind, type) and kind not in (typing.Any, object, type(None))


def _is_text(name: str, value: str) -> bool:
    """Whether a value is a text that YAML takes for something else; a list of texts is one."""
    if not value or value in NULLS or name not in TEXTS:
        return False
    try:
        return not isinstance(yaml.safe_load(value), str | list)
    except yaml.YAMLError:
        return True
