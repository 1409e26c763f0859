"""Any method of this package in one or both towers of CLIP, with a fixed template for the texts."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn as nn

from visionpeft.adapters.storage import method_from
from visionpeft.clip.layout import Tokens
from visionpeft.clip.learner import Learner
from visionpeft.clip.templates import PHOTO, check_templates, fill
from visionpeft.errors import ConfigurationError
from visionpeft.methods.layer_norm_tuning import LayerNormTuning
from visionpeft.methods.parts.base import Method, describe_method

BOTH = ("visual", "text")


class TunedCLIP(Learner):
    """CLIP whose towers a method of this package changes: DoRA, BitFit, LayerNorms, IA3, VPT; the prompt is fixed.

    logits = scale f t^T with unit features of the changed towers, trained by cross-entropy. `CLIPLoRA` is this with
    LoRA and its authors' scale. How the method starts, where it acts and what it trains say the method and its
    `towers`, which are the image tower alone unless it names "text". Trainable: that of the method.
    Source: Zanella and Ben Ayed, Low-Rank Few-Shot Adaptation of Vision-Language Models, 2024, for LoRA; Farina et al.,
    Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages, 2025, for the LayerNorms of both towers,
    which are their first stage and the default here.

    Args:
        clip: an OpenCLIP model. It gets an adapter named "tuned_clip".
        tokenizer: its tokenizer.
        class_names: names of the classes.
        method: the method, or what `describe_method` gives of it; None is `LayerNormTuning` of both towers.
        template: the prompt, with {} for the class name.
        allow_duplicates: accept two classes of one name.

    Raises:
        UnsupportedError: a tower lacks what the method needs.
        ConfigurationError: a method that chooses by a pass over data, several templates, a prompt longer than the text
            tower, or an adapter of that name.
    """

    adapter_name = "tuned_clip"

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        method: Method | dict | None = None,
        template: str | list[str] = PHOTO,
        allow_duplicates: bool = False,
    ):
        if method is None:
            method = LayerNormTuning(towers=list(BOTH))
        elif isinstance(method, Mapping) and {"class", "fields"} <= method.keys():
            method = method_from(dict(method))
        if not isinstance(method, Method):
            raise ConfigurationError(
                f"method must be a method such as visionpeft.DoRA(towers=['visual', 'text']), not {method!r}"
            )
        if method.pending:
            raise ConfigurationError(
                f"{type(method).__name__} chooses what it trains by a pass over labelled images, which a learner does "
                "not make; use a method that needs no such pass"
            )
        if method.stages_after:
            raise ConfigurationError(
                f"{type(method).__name__} is trained in stages, which a learner does not have; attach it to the CLIP "
                "model itself (visionpeft.stages)"
            )
        options = {"method": describe_method(method), "template": template}
        super().__init__(clip, tokenizer, class_names, options=options, allow_duplicates=allow_duplicates)
        templates = check_templates(template)
        if len(templates) > 1:
            raise ConfigurationError(f"the towers are trained with one template, not with {len(templates)}")
        (self.template,) = templates
        self.set_class_names(class_names)
        self.adapt(method)
        # <method>.<tower>. ...; parameters of the CLIP itself are under "trained" by their own names, where all that is
        # not visual are of the texts. What several towers share has neither name, and belongs to both.
        trained = [
            name.partition(".")[::2] for name, p in clip.peft[self.adapter_name].named_parameters() if p.requires_grad
        ]
        self.frozen_texts = all(rest.startswith("visual.") for _, rest in trained)
        self.frozen_images = all(
            rest.startswith("text.") or (part == "trained" and not rest.startswith("visual.")) for part, rest in trained
        )

    def prompts(self, names: Sequence[str]) -> list[Tokens]:
        """The template with each name."""
        return self.tokenizer.contents(fill(self.template, name) for name in names)

    def text_features(self) -> torch.Tensor:
        """Unit text features (classes, features)."""
        return self.kept("text", self.encode_text) if self.frozen_texts else super().text_features()
