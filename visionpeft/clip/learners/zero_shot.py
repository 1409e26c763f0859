"""Zero-shot CLIP: Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020."""

from collections.abc import Callable, Sequence

import torch.nn as nn

from visionpeft.clip.template_texts import TemplateTexts
from visionpeft.clip.templates import PHOTO


class ZeroShot(TemplateTexts):
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

    by_gradient = False

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        template: str | list[str] | None = None,
        allow_duplicates: bool = False,
    ):
        super().__init__(
            clip,
            tokenizer,
            class_names,
            options={"template": template},
            templates=PHOTO if template is None else template,
            allow_duplicates=allow_duplicates,
        )
        self.set_class_names(class_names)
