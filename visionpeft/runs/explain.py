"""One clear sentence out of jsonargparse's nested messages, with the nearest valid names."""

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from typing import get_args

from jsonargparse import ArgumentParser

from visionpeft.errors import ConfigurationError, UserError, did_you_mean, one_line
from visionpeft.runs.options import unknown_option

_NOT_ACCEPTED = re.compile(r"(?:Problem with given class_path '([\w.]+)':\s*)?Option '([\w.]+)' is not accepted")
_GROUP = re.compile(r"Group '([\w.]+)' does not accept option '([\w.]+)'")
_UNRECOGNIZED = re.compile(
    r"(?:Problem with given class_path '([\w.]+)':\s*)?unrecognized arguments: -*([\w.]+)", re.DOTALL
)
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_MISSING = re.compile(r"Problem with given class_path '([\w.]+)':\s*the following arguments are required: ([\w, ]+)")
_VALUE = re.compile(r"Parser key \"([\w.]+)\":\s*Expected an? (.*?)(?:\. Got value: (.*))?$", re.MULTILINE)
_UNION = re.compile(
    r"Parser key \"([\w.]+)\":\s*Does not validate against any of the Union subtypes\s*"
    r"Subtypes: \[(.*?)\]\n.*?Given value: ([^\n]*)",
    re.DOTALL,
)
# Of a list or dictionary of texts: a member that YAML did not read as one.
_READ_AS = re.compile(r"Expected a <class 'str'>\. Got value: (\S+)\n(?:.*\n)*\s*Given value: [\[{]")
_FACTORY = re.compile(
    r"^( *)Type collections\.abc\.Callable\[.*?\] expects a function or a callable class: "
    r"(.*?)\. Got value: Namespace\(class_path='([\w.]+)'.*?\)$",
    re.DOTALL | re.MULTILINE,
)
_REQUIREMENT = re.compile(r"Problem with given class_path '([\w.]+)':\s*Requirement '([^']+)' not met", re.DOTALL)
# What the base class said, as which an option of one callback of a list is tried, too.
_AS_BASE = re.compile(
    r"^ *- Problem with given class_path 'lightning\.Callback':\n *Option '[\w.]+' is not accepted\n", re.MULTILINE
)
_BUILT = re.compile(r"Does not validate against any of the Union subtypes\nSubtypes: \[[^\n]*\b(Logger|Callback)\b")
_WORDS = {
    "int": "a whole number",
    "Batches": "a number of batches",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
}
_LISTS = ("list", "tuple")


def explain(message: str, parser: ArgumentParser, classes: Iterable[type]) -> str:
    """Say in one sentence what was wrong.

    Args:
        message: what jsonargparse reports, nested over many lines.
        parser: the parser that refused.
        classes: the classes a configuration can name: tasks, data modules and methods, loggers and callbacks.
    """
    by_name = {cls.__name__: cls for cls in classes}
    # The arguments of a class that is built later are reported in another form than those of one built at once.
    message = _FACTORY.sub(r"\1Problem with given class_path '\3':\n\1  \2", message)
    if "Problem with given class_path" in (without := _AS_BASE.sub("", message)):
        message = without
    if match := _innermost(_NOT_ACCEPTED, message):
        return _unknown_option(match[1], match[2], parser, by_name)
    if match := _innermost(_GROUP, message):
        return (
            f"{match[1]} has no option {match[2]!r}{did_you_mean(match[2].split('.')[0], _options(parser, match[1]))}"
        )
    if match := _innermost(_UNRECOGNIZED, message):
        return _unknown_option(match[1], match[2], parser, by_name)
    if match := _innermost(_NO_CLASS, message):
        ours = match[1] in by_name and by_name[match[1]].__module__.partition(".")[0] != "lightning"
        if ours:  # to which "did you mean" itself would be no help
            return (
                f"there is no class {match[1]!r} that goes here; tasks go to --model, methods to --model.method, "
                "learners to --model.learner and data to --data, and with --config NAME.yaml each has a help of its "
                "own, such as --model.method.help LoRA"
            )
        return f"there is no class {match[1]!r}{did_you_mean(match[1], _candidates(message, by_name))}"
    if match := _innermost(_MISSING, message):
        return _missing_options(match, message)
    if match := _innermost(_VALUE, message):
        takes = _type_in_words(match[2])
        if takes in _LISTS:
            takes = f"a list, such as '[{match[3] or 'a, b'}]'"
        return f"option {match[1]} takes {takes}" + (f", not {match[3]!r}" if match[3] else "")
    starts = [match.start() for match in re.finditer("Parser key", message)]
    if match := next(filter(None, (_UNION.match(message, start) for start in reversed(starts))), None):
        if read := _READ_AS.search(match[0]):
            return (
                f"option {match[1]} takes texts, and {read[1]} in {match[3]} is none: words such as no, yes, on, off "
                'and null, and numbers, are read as other values without quotes; write \'["no", "01"]\''
            )
        return f"option {match[1]} takes {_types_in_words(match[2])}, not {match[3]!r}"
    if "arguments are required" in message:
        return "name a configuration, such as --config vtab_vpt.yaml; model and data come from it"
    return " ".join(message.split())


def user_error(error: BaseException | None) -> UserError | None:
    """The error meant for the user that others were raised from, if there is one."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        error = error.__cause__ or error.__context__
    return None


def missing_package(error: BaseException) -> ConfigurationError | None:
    """The error to show where a class of the configuration needs a package that is not installed."""
    if match := _REQUIREMENT.search(str(error)):
        class_path, requirement = match.groups()
        return ConfigurationError(
            f"{class_path.rpartition('.')[2]} needs {requirement}, which is not installed; run pip install "
            f"'{requirement}', or leave it out"
        )
    return None


def refused_when_built(error: BaseException) -> ConfigurationError | None:
    """The error to show where a callback or logger refuses the values that it is built with."""
    reason, text = error.__cause__, str(error)
    if reason is None or not _BUILT.match(text):
        return None
    named = {path.rpartition(".")[2] for path in re.findall(r"class_path='([\w.]+)'", text)}
    return ConfigurationError(f"{' or '.join(sorted(named)) or 'trainer'}: {one_line(reason)}")


def _innermost(pattern: re.Pattern, message: str) -> re.Match | None:
    """The match that is nested deepest: the one with the largest indentation."""

    def depth(match: re.Match) -> int:
        line = message[: match.start()].rpartition("\n")[2] + match[0]
        return len(line) - len(line.lstrip(" -"))

    matches = list(pattern.finditer(message))
    return max(matches, key=depth) if matches else None


def _type_in_words(expected: str) -> str:
    """Python's notation of types and literals as words."""
    if literals := re.findall(r"Literal\[(.*?)\]", expected):
        return f"one of {', '.join(literals).replace(chr(39), '')}"
    names = re.findall(r"<class '(?:[\w.]+\.)?(\w+)'>", expected)
    return " or ".join(_WORDS.get(name, name) for name in names) or expected.rstrip(": ")


def _types_in_words(union: str) -> str:
    """The members of a union as words, of lists and dictionaries what they are."""
    found = []
    depth, members = 0, ""
    for letter in union:  # commas within brackets are between what one member is made of
        depth += {"[": 1, "]": -1}.get(letter, 0)
        members += "\n" if letter == "," and depth == 0 else letter
    for member in map(str.strip, members.splitlines()):
        kind = re.match(r"(?:[\w.]+\.)?(list|tuple|Sequence|dict|Mapping)\[", member)
        word = (
            _type_in_words(member) if kind is None else "a dictionary" if kind[1] in ("dict", "Mapping") else "a list"
        )
        found += [word] if word not in found else []
    return " or ".join(found)


def _unknown_option(class_path: str | None, option: str, parser: ArgumentParser, by_name: dict[str, type]) -> str:
    if class_path is None:
        first = option.split(".")[0]
        known = {dest.split(".")[0] for dest in _dests(parser)}
        if first in known and "." in option:
            last = option.rpartition(".")[2]
            return f"{first} has no option {option.partition('.')[2]!r}{did_you_mean(last, _options(parser, first))}"
        return f"there is no option {option!r}{did_you_mean(first, known)}"
    cls = by_name.get(class_path.rpartition(".")[2])
    name = class_path.rpartition(".")[2]
    if cls is None:
        return f"{name} has no option {option!r}"
    head, _, rest = option.partition(".")
    parameters = _parameters(cls)
    if rest and head in parameters:  # a field of a nested dataclass
        nested = parameters[head].annotation
        return unknown_option(f"{name}.{head}", rest, _parameters(nested) if isinstance(nested, type) else ())
    inner = {
        outer: _parameters(parameter.annotation)
        for outer, parameter in parameters.items()
        if is_dataclass(parameter.annotation)
    }
    return unknown_option(name, option, parameters, inner)


def _missing_options(match: re.Match, message: str) -> str:
    """What a class needs that was not given, and how to give it where the class stands directly below its key."""
    names = match[2].split(", ")
    needs = f"{match[1].rpartition('.')[2]} needs {' and '.join(names)}"
    keys = re.findall(r'Parser key "([\w.]+)"', message[: match.start()])
    return needs if len(keys) != 1 else f"{needs}; give {' '.join(f'--{keys[0]}.{name} ...' for name in names)}"


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Constructor arguments by name, following **kwargs to the base classes."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        found |= {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} | found
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def _candidates(message: str, by_name: dict[str, type]) -> list[str]:
    """Names of the classes that were allowed where the message's unknown class stands."""
    before = message[: message.rindex("Expected a dot import path string")]
    named = re.findall(r"<class '[\w.]+\.(\w+)'>", before) + _annotated(before, by_name)
    for base in reversed(named):
        if base in by_name:
            allowed = [name for name, cls in by_name.items() if issubclass(cls, by_name[base]) and cls.__module__]
            return [name for name in allowed if name != base] or [base]
    return list(by_name)


def _annotated(before: str, by_name: dict[str, type]) -> list[str]:
    """Names of the classes in the annotation of the argument reached last; for a factory the message shows no type."""
    owners = re.findall(r"Problem with given class_path '(?:[\w.]+\.)?(\w+)'", before)
    arguments = re.findall(r'Parser key "([\w.]+)"', before)
    if not owners or owners[-1] not in by_name or not arguments:
        return []
    parameter = _parameters(by_name[owners[-1]]).get(arguments[-1])
    return [] if parameter is None else [part.__name__ for part in _classes(parameter.annotation)]


def _classes(annotation: object) -> Iterator[type]:
    """The classes in an annotation, those of a factory's result last."""
    if isinstance(annotation, type):
        yield annotation
    for part in annotation if isinstance(annotation, list) else get_args(annotation):
        yield from _classes(part)


def _dests(parser: ArgumentParser) -> list[str]:
    return [action.dest for action in parser._actions]


def _options(parser: ArgumentParser, group: str) -> list[str]:
    return [dest.removeprefix(f"{group}.") for dest in _dests(parser) if dest.startswith(f"{group}.")]
