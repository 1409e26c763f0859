"""TaskRes: Task Residual for Tuning Vision-Language Models (Yu et al., 2023), https://arxiv.org/abs/2211.10277."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from visionpeft.clip.template_ensemble import raw_ensemble
from visionpeft.clip.template_texts import TemplateTexts
from visionpeft.clip.templates import PHOTO
from visionpeft.clip.text import unit
from visionpeft.errors import ConfigurationError


class TaskRes(TemplateTexts):
    """Adds a learned residual x_k to the frozen text feature t_k of each class: scale f unit(t_k + strength x_k)^T.

    t_k is the mean over the templates of text features that are not normalised, so that `strength` is measured in their
    length, about 10 for OpenAI's CLIP. x (classes, features) starts at zero, where this is zero-shot CLIP. Neither
    tower is run for a gradient; text and residual together are one linear classifier, `text_features()`.
    Trainable: classes * e, with e features.
    Source: Yu et al., Task Residual for Tuning Vision-Language Models, 2023. The authors' "enhanced base", text
    features of a projection that is tuned before, is not built: what makes it was not published.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        strength: weight of the residual; the authors take 0.5, and 1 for Flowers102.
        template: one template or several for the texts, with {} for the class name; None is the data set's own in a
            run, "task_res_8" for ImageNet, and "a photo of a {}." otherwise.
        allow_duplicates: accept two classes of one name.

    Raises:
        ConfigurationError: a strength that is not positive, or class names or templates that cannot be used.
    """

    class_bound = True
    template_style = "task_res"

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        strength: float = 0.5,
        template: str | list[str] | None = None,
        allow_duplicates: bool = False,
    ):
        if not 0 < strength < math.inf:
            raise ConfigurationError(f"strength must be a positive number, with which a residual acts, not {strength}")
        super().__init__(
            clip,
            tokenizer,
            class_names,
            options={"strength": strength, "template": template},
            templates=PHOTO if template is None else template,
            allow_duplicates=allow_duplicates,
        )
        self.strength = strength
        self.set_class_names(class_names)
        dtype = torch.float64 if self.text.dtype == torch.float64 else torch.float32
        self.residual = nn.Parameter(
            torch.zeros(len(self.class_names), self.text.num_features, dtype=dtype, device=self.text.device)
        )

    def raw_template_features(self) -> torch.Tensor:
        """Frozen text features t (classes, features) of their own length."""
        return self.kept(
            "raw templates",
            lambda: raw_ensemble(self.text, self.frozen_layouts, self.chunk_size, self.fast_text),
        )

    def text_features(self) -> torch.Tensor:
        """Unit text features (classes, features): the rows of the classifier."""
        raw = self.raw_template_features().to(self.residual.dtype)
        # Under autocast a residual of a hundredth of the feature would be lost in the rounding.
        with torch.autocast(raw.device.type, enabled=False):
            return unit(raw + self.strength * self.residual)
