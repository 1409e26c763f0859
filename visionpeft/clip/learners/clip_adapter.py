"""CLIP-Adapter: Better Vision-Language Models with Feature Adapters (Gao et al., 2021), https://arxiv.org/abs/2110.04544."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from visionpeft.clip.template_texts import TemplateTexts
from visionpeft.clip.templates import PHOTO
from visionpeft.clip.text import unit
from visionpeft.errors import ConfigurationError


class CLIPAdapter(TemplateTexts):
    """A small network on the image features: f' = ratio * relu(W_2 relu(W_1 f)) + (1 - ratio) * f.

    f' is then normalised and compared with frozen text features of a template. Without biases, f' is proportional to
    the length of f, so that starting from unit features gives what starting from CLIP's unnormalised ones gives.
    Weights start as `nn.Linear` does. Trainable: 2 e (e // reduction) for e features.
    Source: Gao et al., CLIP-Adapter: Better Vision-Language Models with Feature Adapters, 2021.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        ratio: share of the adapted features.
        reduction: the network is this many times narrower than the features.
        template: one template or several for the texts, with {} for the class name; None is the data set's own in a
            run, and "a photo of a {}." otherwise.
        allow_duplicates: accept two classes of one name.

    Raises:
        ConfigurationError: a ratio outside 0 to 1, or a reduction that leaves nothing.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        ratio: float = 0.2,
        reduction: int = 4,
        template: str | list[str] | None = None,
        allow_duplicates: bool = False,
    ):
        super().__init__(
            clip,
            tokenizer,
            class_names,
            options={"ratio": ratio, "reduction": reduction, "template": template},
            templates=PHOTO if template is None else template,
            allow_duplicates=allow_duplicates,
        )
        features = self.text.num_features
        if not 0 <= ratio <= 1 or not 1 <= reduction <= features:
            raise ConfigurationError(
                f"ratio must lie between 0 and 1 and reduction between 1 and {features}, not {ratio} and {reduction}"
            )
        self.ratio = ratio
        self.set_class_names(class_names)
        dtype = torch.float64 if self.text.dtype == torch.float64 else torch.float32
        hidden = features // reduction
        self.adapter = nn.Sequential(
            nn.Linear(features, hidden, bias=False),
            nn.ReLU(),
            nn.Linear(hidden, features, bias=False),
            nn.ReLU(),
        ).to(self.text.device, dtype)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of image features (batch, features), of which only the direction matters."""
        features = features.to(self.adapter[0].weight.dtype)
        adapted = self.ratio * self.adapter(features) + (1 - self.ratio) * features
        return self.logits(unit(adapted), self.text_features())
