"""Prompt templates as shipped in `datasets/templates.json`, and the one that belongs to each data set."""

import json

from visionpeft.data.few_shot_definitions import few_shot_datasets, find_few_shot
from visionpeft.errors import ConfigurationError
from visionpeft.naming import did_you_mean
from visionpeft.resources import shipped


def template_sets() -> dict[str, list[str]]:
    """All named sets of templates; in each template `{}` stands for the class name."""
    return json.loads((shipped("datasets") / "templates.json").read_text(encoding="utf-8"))


def templates(name: str) -> list[str]:
    """A named set: "photo", "openai_imagenet_80", "simple_7" or "tip_7".

    `simple_7` (OpenAI's selection out of the 80) and `tip_7` (Tip-Adapter's for ImageNet) hold the same templates.

    Raises:
        ConfigurationError: there is no such set.
    """
    sets = template_sets()
    if name not in sets:
        raise ConfigurationError(f"there is no set of templates '{name}'{did_you_mean(name, sets)}")
    return sets[name]


def dataset_template(dataset: str, style: str = "zero_shot") -> str:
    """The template of a data set of the few-shot benchmark, by key or alias.

    Args:
        dataset: Such as "dtd"; upper and lower case alike.
        style: "zero_shot": as CoOp, CLIP-Adapter and Tip-Adapter use it; "prograd": with the class name last;
            "kgcoop": the zero-shot template but for DTD.

    Raises:
        ConfigurationError: an unknown data set or style.
    """
    key = find_few_shot(dataset)
    if style not in ("zero_shot", "prograd", "kgcoop"):
        raise ConfigurationError(f"unknown style '{style}' of template: choose zero_shot, prograd or kgcoop")
    own = few_shot_datasets()[key]["templates"]
    return own.get(style, own["zero_shot"])


def check_template(template: str) -> str:
    """The template itself; raises ConfigurationError unless `{}` stands in it exactly once."""
    if template.count("{}") != 1:
        raise ConfigurationError(f"template '{template}' must hold {{}} exactly once, where the class name goes")
    return template
