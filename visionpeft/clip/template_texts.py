"""What learners share whose texts are templates with the name of a class, and frozen."""

from collections.abc import Sequence

import torch

from visionpeft.clip.layout import Tokens
from visionpeft.clip.learner import Learner
from visionpeft.clip.templates import fill


class TemplateTexts(Learner):
    """Base of learners that read each class name in templates, and learn nothing of the texts."""

    def prompts(self, names: Sequence[str]) -> list[Tokens]:
        """The first template with each name."""
        return self.tokenizer.contents(fill(self.templates[0], name) for name in names)

    def text_features(self) -> torch.Tensor:
        """Unit text features (classes, features), frozen."""
        return self.template_features()
