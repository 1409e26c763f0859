"""TPS: Just Shift It: Test-Time Prototype Shifting (Sui et al., 2024), https://arxiv.org/abs/2403.12952."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from visionpeft.clip.templates import PHOTO
from visionpeft.clip.text import unit
from visionpeft.clip.views import FromViews, check_selection, check_views, confident, marginal_entropy
from visionpeft.errors import ConfigurationError


class TPS(FromViews):
    """Shifts the text feature of each class for each test image alone: logits = scale f unit(t_k + x_k)^T.

    t are unit text features of a template; x (classes, features) is zero before every image. The loss is that of `TPT`:
    the entropy of the mean of the probabilities of those views, chosen once, whose predictions have the lowest entropy.
    After `steps` steps of a fresh AdamW (without decay) view 0 is classified and x is forgotten. No tower is
    differentiated. Labels are never used; nothing is trained. Images of a batch do not see each other. Tuned: classes *
    e, with e features.
    Source: Sui et al., Just Shift It: Test-Time Prototype Shifting for Zero-Shot Generalization with Vision-Language
    Models, 2024. With the authors' one step it is theirs; in further ones their code chooses the views anew, and decays
    x.

    The learner takes views (batch, views, 3, height, width), view 0 being plain. For images it draws the other views
    itself as `TPT` does.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        steps: optimiser steps on each image.
        num_views: views of an image if they are drawn here.
        selection: share of the views that is chosen; at least one is.
        lr: learning rate of AdamW; the authors take 0.005 for ImageNet and its variants, 0.001 for small data sets.
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
        steps: int = 1,
        num_views: int = 64,
        selection: float = 0.1,
        lr: float = 5e-3,
        template: str | list[str] | None = None,
        allow_duplicates: bool = False,
    ):
        check_selection(selection, num_views)
        if not isinstance(steps, int) or steps < 1 or lr < 0:
            raise ConfigurationError(
                f"steps must be an integer of at least 1 and lr must not be negative, not {steps} and {lr}"
            )
        options = {"steps": steps, "num_views": num_views, "selection": selection, "lr": lr, "template": template}
        super().__init__(
            clip,
            tokenizer,
            class_names,
            options=options,
            templates=PHOTO if template is None else template,
            allow_duplicates=allow_duplicates,
        )
        self.steps, self.num_views, self.selection, self.lr = steps, num_views, selection, lr
        self.set_class_names(class_names)

    @property
    def num_tuned(self) -> int:
        """Number of values tuned on each image."""
        return len(self.class_names) * self.text.num_features

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of view 0, after shifting on the unit features (batch, views, features) of all views.

        Raises:
            ConfigurationError: features of one view only.
        """
        check_views(self, features)
        # Lightning tests in inference mode, where no gradient exists.
        with torch.inference_mode(False):
            features, texts = features.detach().clone(), self.template_features().detach()
            shift = self.tune(features, texts)
            with torch.no_grad():
                return self.logits(features[:, :1], unit(texts + shift))[:, 0]

    def tune(self, features: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Shifts (batch, classes, features), each tuned on the unit features (batch, views, features) of one image."""
        with torch.no_grad():
            chosen = confident(features, self.logits(features, texts), self.selection)
        shift = texts.new_zeros(len(features), *texts.shape).requires_grad_()
        # AdamW acts on every value by itself, so that one optimiser for all images is one for each.
        optimizer = torch.optim.AdamW([shift], lr=self.lr, weight_decay=0.0)
        for _ in range(self.steps):
            with torch.enable_grad():
                loss = marginal_entropy(self.logits(chosen, unit(texts + shift))).sum()
            (shift.grad,) = torch.autograd.grad(loss, shift)
            optimizer.step()
        return shift.detach()
