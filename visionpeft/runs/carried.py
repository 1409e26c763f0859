"""Saved adapters and learners that a configuration names, copied into the run, which then does without them."""

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from visionpeft.errors import StorageError
from visionpeft.files import write_json
from visionpeft.runs.config_files import parsed

STEMS = ("learner", "adapter")


def carry(content: dict, folder: Path) -> None:
    """Copy the adapters and learners that a configuration names into a folder, and note which is which.

    Args:
        content: the configuration, as plain values.
        folder: to be made; none is made where no adapter is named.

    Raises:
        StorageError: one cannot be copied.
    """
    named: dict[str, str] = {}
    _renamed(content, lambda source: named.setdefault(source, str(len(named))))
    try:
        for source, name in named.items():
            (folder / name).mkdir(parents=True)
            stem = next((stem for stem in STEMS if (Path(source) / f"{stem}.json").is_file()), "adapter")
            for file in (f"{stem}.json", f"{stem}.safetensors"):
                shutil.copyfile(Path(source) / file, folder / name / file)
    except OSError as error:
        raise StorageError(f"the adapters that this run begins with could not be copied into it: {error}") from None
    if named:
        write_json(folder / "names.json", named)


def with_carried(content: dict, folder: Path) -> dict:
    """A configuration that names the copies in a folder in the place of what was copied there.

    Args:
        content: the configuration of a run.
        folder: where `carry` has put them; it need not be there.
    """
    names = folder / "names.json"
    if not names.is_file():
        return content
    carried = json.loads(names.read_text(encoding="utf-8"))
    return _renamed(content, lambda source: str(folder / carried[source]) if source in carried else source)


def as_carried(text: str, folder: Path) -> str:
    """The reverse of `with_carried`, of a configuration as text: with the names of what was copied into a folder."""
    names = folder / "names.json"
    if not names.is_file():
        return text
    carried = json.loads(names.read_text(encoding="utf-8"))
    sources = {str(folder / name): source for source, name in carried.items()}
    return yaml.safe_dump(_renamed(parsed(text), lambda copy: sources.get(copy, copy)), sort_keys=False)


def _renamed(content: dict, rename: Callable[[str], str]) -> dict:
    """A configuration with other folders of adapters: `start` of the model, and `adapters` of its methods."""
    content = copy.deepcopy(content)
    options = (content.get("model") or {}).get("init_args") or {}
    if options.get("start"):
        options["start"] = rename(options["start"])
    methods = options.get("method")
    for method in methods if isinstance(methods, Sequence) else [methods]:
        given = (method.get("init_args") or {}) if isinstance(method, dict) else {}
        if given.get("adapters"):
            given["adapters"] = [rename(source) for source in given["adapters"]]
    return content
