"""Hand-written templates such as "a photo of a {}.", and the frozen text features they give."""

from collections.abc import Sequence

import torch

from visionpeft.clip.layout import Layout, Tokenizer
from visionpeft.clip.text import TextEncoder, unit
from visionpeft.errors import ConfigurationError

PHOTO = "a photo of a {}."


def fill(template: str, name: str) -> str:
    """The template with the class name in the place of {}."""
    return template.replace("{}", name)


def check_templates(template: str | Sequence[str]) -> tuple[str, ...]:
    """One or several templates as a tuple.

    Raises:
        ConfigurationError: there is none, or one does not have exactly one {}.
    """
    templates = (template,) if isinstance(template, str) else tuple(template)
    if not templates:
        raise ConfigurationError("at least one template is needed, such as 'a photo of a {}.'")
    for each in templates:
        if not isinstance(each, str) or each.count("{}") != 1:
            raise ConfigurationError(f"template {each!r} must have one {{}} where the class name stands")
    return templates


def template_layouts(tokenizer: Tokenizer, templates: Sequence[str], class_names: Sequence[str]) -> list[Layout]:
    """The texts of all classes, one layout for each template."""
    return [
        tokenizer.layout(tokenizer.contents(fill(template, name) for name in class_names), class_names)
        for template in templates
    ]


@torch.no_grad()
def ensemble(text: TextEncoder, layouts: Sequence[Layout], chunk_size: int | None = None, fast: bool = True):
    """Unit text features (classes, features): the mean over templates of unit features, normalised again."""
    features = [unit(text.encode(layout, chunk_size=chunk_size, fast=fast))[0] for layout in layouts]
    return features[0] if len(features) == 1 else unit(torch.stack(features).mean(dim=0))
