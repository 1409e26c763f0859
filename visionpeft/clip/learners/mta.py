"""MTA: On the Test-Time Zero-Shot Generalization of Vision-Language Models (Zanella and Ben Ayed), arXiv 2405.02266."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from visionpeft.clip.templates import PHOTO
from visionpeft.clip.text import unit
from visionpeft.clip.views import FromViews, check_selection, check_views
from visionpeft.errors import ConfigurationError

ROUNDS = 5
NEIGHBOURS = 0.3


class MTA(FromViews):
    """Zero-shot CLIP on a robust mean of an image's views: the mode m of their features, found by mean shift.

    With the unit features f_v of V views, their zero-shot probabilities P (V, classes), W = P P^T, and the bandwidth
    h_v^2 = half the mean squared distance of view v to its nearest floor(0.3 (V - 1)) views, m starts at view 0 and the
    weights y at 1 / V. Five rounds of

        k_v = exp(-|f_v - m|^2 / (2 h_v^2)), then five times y = softmax((k + agreement W y) / temperature),
        five times m = unit(sum_v y_v k_v f_v), with k of the m before.

    Logits are scale m t^T. Nothing is trained, tuned or differentiated. Images do not see each other.
    Source: Zanella and Ben Ayed, On the Test-Time Zero-Shot Generalization of Vision-Language Models: Do We Really Need
    Prompt Learning?, 2024. The authors stop a repetition early at changes below 1e-6.

    The learner takes views (batch, views, 3, height, width), view 0 being plain. For images it draws the other views
    itself as `TPT` does.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        num_views: views of an image if they are drawn here.
        agreement: weight of views that predict alike.
        temperature: of the weights of the views.
        template: one template or several for the texts, with {} for the class name; None is the data set's own in a
            run, and "a photo of a {}." otherwise.
        allow_duplicates: accept two classes of one name.

    Raises:
        ConfigurationError: a number out of range, or class names or templates that cannot be used.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        num_views: int = 64,
        agreement: float = 4.0,
        temperature: float = 0.2,
        template: str | list[str] | None = None,
        allow_duplicates: bool = False,
    ):
        check_selection(1, num_views)
        if not (0 <= agreement < math.inf and 0 < temperature < math.inf):
            raise ConfigurationError(
                f"agreement must not be negative and temperature must be positive, not {agreement} and {temperature}"
            )
        options = {"num_views": num_views, "agreement": agreement, "temperature": temperature, "template": template}
        super().__init__(
            clip,
            tokenizer,
            class_names,
            options=options,
            templates=PHOTO if template is None else template,
            allow_duplicates=allow_duplicates,
        )
        self.num_views, self.agreement, self.temperature = num_views, agreement, temperature
        self.set_class_names(class_names)

    @torch.no_grad()
    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of the mode of unit features (batch, views, features).

        Raises:
            ConfigurationError: features of one view only.
        """
        check_views(self, features)
        texts = self.text_features()
        features = features.to(torch.promote_types(features.dtype, texts.dtype))
        probabilities = self.logits(features, texts).softmax(dim=-1)
        with torch.autocast(features.device.type, enabled=False):
            mode = self.mode(features, probabilities.to(features.dtype))
        return self.logits(mode, texts)

    def mode(self, features: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        """Unit mode (batch, features) of unit features (batch, views, features) with probabilities of classes."""
        alike = probabilities @ probabilities.mT
        twice_squared = 2 * bandwidths(features)
        mode = features[:, 0]
        weights = torch.full_like(twice_squared, 1 / features.shape[1])

        def kernel() -> torch.Tensor:
            """How near (batch, views) each view is to the mode."""
            return (-(features - mode[:, None]).square().sum(dim=-1) / twice_squared).exp()

        for _ in range(ROUNDS):
            near = kernel()
            for _ in range(ROUNDS):
                agreed = (alike @ weights[..., None])[..., 0]
                weights = ((near + self.agreement * agreed) / self.temperature).softmax(dim=-1)
            for _ in range(ROUNDS):
                mode = unit(((weights * kernel())[..., None] * features).sum(dim=1))
        return mode


def bandwidths(features: torch.Tensor) -> torch.Tensor:
    """h_v^2 (batch, views) of features (batch, views, features), half the mean squared distance to the nearest."""
    views = features.shape[1]
    squared = (features[:, :, None] - features[:, None]).square().sum(dim=-1)
    nearest = squared.sort(dim=-1).values[..., 1 : 1 + max(1, int(NEIGHBOURS * (views - 1)))]
    # Of equal views, and of one alone, every bandwidth above zero gives the same mode.
    half = nearest.mean(dim=-1) / 2 if views > 1 else torch.zeros_like(squared[..., 0])
    return half.clamp(min=torch.finfo(features.dtype).eps)
