"""Recipes: which hyper-parameters are searched for a method on a benchmark, and how its paper trained and reported.

A configuration's recipe is `recipes/<its name>` beside it; one without is searched by `configs/recipes/default.yaml`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from visionpeft.errors import ConfigurationError
from visionpeft.files import shipped
from visionpeft.runs.config_files import config_name

REPORTS = {
    "last": "last epoch",
    "best_test": "best test epoch: selected on the test split, as the paper did",
}


@dataclass(frozen=True)
class Recipe:
    """What is searched, and the paper's own rule. Options are those of `visionpeft.fit`, without dashes.

    Args:
        source: where it comes from.
        settings: options with which the grid is searched.
        grid: values of each searched option.
        paper: further options of the paper, where there is one.
        tasks: options of single tasks in the paper.
        seeds: the paper's.
        report: the epoch it reports: "last", or "best_test".
        differs: what of the paper this does not reproduce.
    """

    source: str
    settings: Mapping[str, object] = field(default_factory=dict)
    grid: Mapping[str, list] = field(default_factory=dict)
    paper: Mapping[str, object] | None = None
    tasks: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    report: str = "last"
    differs: str = ""


def find_recipe(config: Path) -> Recipe:
    """The recipe of a configuration, or the default one.

    Raises:
        ConfigurationError: the recipe has other entries than these.
    """
    file = config.parent / "recipes" / config.name
    if not file.is_file():
        file = shipped("configs") / "recipes" / "default.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    names = {field.name for field in fields(Recipe)}
    if not isinstance(content, dict) or not {"source"} <= content.keys() <= names:
        raise ConfigurationError(f"{file} is not a recipe: it needs source, and may have {', '.join(sorted(names))}")
    if content.get("report", "last") not in REPORTS:
        raise ConfigurationError(f"{file}: report is {content['report']!r}, not {' or '.join(REPORTS)}")
    return Recipe(**{**content, "seeds": tuple(content.get("seeds", ()))})


def paper_recipe(config: Path) -> Recipe:
    """The recipe with the paper's rule.

    Raises:
        ConfigurationError: none is known.
    """
    recipe = find_recipe(config)
    if recipe.paper is None:
        name = config_name(str(config))
        folder = shipped("configs") / name.partition("_")[0]
        known = sorted(
            f"{folder.name}_{path.name}"
            for path in (folder / "recipes").glob("*.yaml")
            if yaml.safe_load(path.read_text(encoding="utf-8")).get("paper") is not None
        )
        raise ConfigurationError(f"no paper's rule is known for {name}.yaml; --paper has {', '.join(known)}")
    return recipe


def as_arguments(options: Mapping[str, object]) -> list[str]:
    """Options as the command line takes them."""
    arguments = []
    for option, value in options.items():
        parent, _, name = option.rpartition(".")
        if value is None and "." in parent:  # jsonargparse takes null for a nested option only within its parent
            arguments += [f"--{parent}", json.dumps({name: None})]
        else:
            arguments += [f"--{option}", value if isinstance(value, str) else json.dumps(value)]
    return arguments
