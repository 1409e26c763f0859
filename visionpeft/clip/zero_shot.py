"""Zero-shot CLIP: Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from visionpeft.clip.layout import Layout, Tokenizer
from visionpeft.clip.learner import Learner, unit
from visionpeft.clip.text import TextEncoder
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


class ZeroShot(Learner):
    """CLIP as it is: t_k = unit(mean over templates of unit(text(template with the name of class k))).

    Nothing is trained.
    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        template: one template or several, with {} for the class name; None is the data set's own in a run, and
            "a photo of a {}." otherwise.
        allow_duplicates: accept two classes of one name.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        template: str | list[str] | None = None,
        allow_duplicates: bool = False,
    ):
        super().__init__(
            clip, tokenizer, class_names, options={"template": template}, allow_duplicates=allow_duplicates
        )
        self.templates = check_templates(template or PHOTO)
        self.set_class_names(class_names)

    def set_template(self, template: str | Sequence[str]) -> None:
        """Use the template of a data set where none was given."""
        if self.options["template"] is None:
            self.templates = check_templates(template)
            self.set_class_names(self.class_names)

    def set_class_names(self, class_names: Sequence[str]) -> None:
        """Classify into other classes."""
        super().set_class_names(class_names)
        self.layouts = template_layouts(self.tokenizer, self.templates, self.class_names)

    def prompts(self, names: Sequence[str]):
        """The first template with each name."""
        return self.tokenizer.contents(fill(self.templates[0], name) for name in names)

    def encode_text(self) -> torch.Tensor:
        """Unit text features (classes, features)."""
        return ensemble(self.text, self.layouts, self.chunk_size, self.fast_text)
