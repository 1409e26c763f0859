"""Constructor arguments of classes, read from their source: what is wrong can be said without importing any of them.

Importing Lightning, timm and torch takes seconds of CPU time; a wrong option or a question for help needs none of it.
What cannot be read with certainty is None, and then the real parser decides.
"""

import ast
import functools
import re
from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def parameters(name: str) -> dict[str, str] | None:
    """Constructor arguments of one of the package's classes with their annotations, following **kwargs to its bases.

    Args:
        name: name of the class, with or without its module.

    Returns:
        Annotations by argument, empty where there is none; None if the class is not the package's own, or takes what
        a class from elsewhere takes.
    """
    module, _, name = name.rpartition(".")
    if module and module.partition(".")[0] != "visionpeft":
        return None
    node = _class(name)
    return None if node is None else _parameters(node)


def summary(name: str) -> str:
    """The first line of the docstring of one of the package's classes."""
    return (ast.get_docstring(_class(name)) or "").partition("\n")[0]


def trainer_parameters() -> dict[str, str] | None:
    """The arguments of the installed Lightning's Trainer, as those of `parameters`."""
    package = find_spec("lightning")
    if package is None or not package.submodule_search_locations:
        return None
    source = Path(package.submodule_search_locations[0]) / "pytorch" / "trainer" / "trainer.py"
    if not source.is_file():
        return None
    classes = [node for node in ast.parse(source.read_text("utf-8")).body if isinstance(node, ast.ClassDef)]
    trainer = next((node for node in classes if node.name == "Trainer"), None)
    return None if trainer is None else _parameters(trainer)


@functools.cache
def _sources() -> dict[str, Path]:
    """The file that defines each class at the top of a module."""
    pattern = re.compile(r"^class (\w+)", flags=re.MULTILINE)
    return {name: path for path in PACKAGE.rglob("*.py") for name in pattern.findall(path.read_text("utf-8"))}


@functools.cache
def _class(name: str) -> ast.ClassDef | None:
    if name not in _sources():
        return None
    module = ast.parse(_sources()[name].read_text("utf-8"))
    return next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name)


def _parameters(node: ast.ClassDef) -> dict[str, str] | None:
    own: dict[str, str] = {}
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            arguments = statement.args
            own = {each.arg: _text(each.annotation) for each in [*arguments.args[1:], *arguments.kwonlyargs]}
            if arguments.kwarg is None:
                return own
            break
    else:
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            fields = [
                each for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
            ]
            own = {
                each.target.id: _text(each.annotation)
                for each in fields
                if "ClassVar" not in _text(each.annotation) and "init=False" not in _text(each.value)
            }
    for base in node.bases:
        inherited = parameters(ast.unparse(base))
        if inherited is None:
            return None
        own |= {name: annotation for name, annotation in inherited.items() if name not in own}
    return own


def _text(node: ast.expr | None) -> str:
    return "" if node is None else ast.unparse(node)
