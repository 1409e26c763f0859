"""Prompt templates: texts in which {} stands for the class name. `datasets/templates.json` has named sets of them."""

import json
from collections.abc import Sequence

from visionpeft.errors import ConfigurationError, did_you_mean
from visionpeft.files import shipped

PHOTO = "a photo of a {}."


def template_sets() -> dict[str, list[str]]:
    """All named sets of templates."""
    sets = json.loads((shipped("datasets") / "templates.json").read_text(encoding="utf-8"))
    # PromptSRC's authors list 60 templates: the first of OpenAI's 80, in their order.
    return sets | {"promptsrc_60": sets["openai_imagenet_80"][:60], "task_res_8": [*sets["tip_7"], PHOTO]}


def templates(name: str) -> list[str]:
    """A named set: "photo", "openai_imagenet_80", "promptsrc_60", "simple_7", "tip_7" or "task_res_8".

    `promptsrc_60` is the first 60 of the 80, which PromptSRC's teacher has for every data set (Khattak et al., 2023,
    arXiv 2307.06948). `simple_7` (OpenAI's selection out of the 80) and `tip_7` (Tip-Adapter's for ImageNet) hold the
    same templates; `task_res_8`, of TaskRes and CLAP on ImageNet, has "a photo of a {}." besides.

    Raises:
        ConfigurationError: there is no such set.
    """
    sets = template_sets()
    if name not in sets:
        raise ConfigurationError(
            f"template {name!r} has no {{}} for the class name and is no named set of templates"
            f"{did_you_mean(name, sets)}"
        )
    return sets[name]


def check_templates(template: str | Sequence[str]) -> tuple[str, ...]:
    """One template, several, or a named set of them, as a tuple.

    Raises:
        ConfigurationError: there is none, one does not have {} exactly once, or there is no set of that name.
    """
    if isinstance(template, str):
        template = [template] if "{}" in template else templates(template)
    if not template:
        raise ConfigurationError("at least one template is needed, such as 'a photo of a {}.'")
    for each in template:
        if not isinstance(each, str) or each.count("{}") != 1:
            raise ConfigurationError(f"template {each!r} must hold {{}} exactly once, where the class name goes")
    return tuple(template)


def fill(template: str, name: str) -> str:
    """The template with the class name in the place of {}."""
    return template.replace("{}", name)
