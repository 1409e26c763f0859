"""The texts that hand-written templates make of class names, and the frozen text features they give."""

from collections.abc import Sequence

import torch

from visionpeft.clip.layout import Layout, Tokenizer
from visionpeft.clip.templates import fill
from visionpeft.clip.text import TextEncoder, unit


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


@torch.no_grad()
def raw_ensemble(text: TextEncoder, layouts: Sequence[Layout], chunk_size: int | None = None, fast: bool = True):
    """Text features (classes, features) of the length that the tower gives them: their mean over templates."""
    features = [text.encode(layout, chunk_size=chunk_size, fast=fast)[0] for layout in layouts]
    return features[0] if len(features) == 1 else torch.stack(features).mean(dim=0)
