"""CLAP: A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models (Silva-Rodríguez et al., 2024).

https://arxiv.org/abs/2312.12730
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.clip.fitted_splits import check_splits
from visionpeft.clip.template_ensemble import raw_ensemble
from visionpeft.clip.template_texts import TemplateTexts
from visionpeft.clip.templates import PHOTO
from visionpeft.clip.text import unit


class CLAP(TemplateTexts):
    """A linear classifier that starts as zero-shot CLIP and is held near it: logits = scale f unit(w_k)^T.

    w_k starts at t_k, the mean over the templates of text features that are not normalised. The loss is CE + mean_k
    strength_k |w_k - t_k|^2; it sees the length of w_k, which the logits do not. `fit_features` sets strength_k, once:
    the mean zero-shot probability of the right class over the training images of class k, 1 for a class without any.
    With `constrained=False` there is no such term, and this is the zero-shot-initialised linear probe (ZS-LP) of the
    same paper. Neither tower is run for a gradient. Trainable: classes * e, with e features.
    Source: Silva-Rodríguez et al., A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models, 2024.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        constrained: hold the classifier near zero-shot; call `fit_features` before training.
        template: one template or several for the texts, with {} for the class name; None is the data set's own in a
            run, "task_res_8" for ImageNet, and "a photo of a {}." otherwise.
        allow_duplicates: accept two classes of one name.

    Raises:
        ConfigurationError: class names or templates that cannot be used.
    """

    class_bound = True
    features_suffice = True
    template_style = "task_res"

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        constrained: bool = True,
        template: str | list[str] | None = None,
        allow_duplicates: bool = False,
    ):
        super().__init__(
            clip,
            tokenizer,
            class_names,
            options={"constrained": constrained, "template": template},
            templates=PHOTO if template is None else template,
            allow_duplicates=allow_duplicates,
        )
        self.constrained = constrained
        self.set_class_names(class_names)
        self.dtype = torch.float64 if self.text.dtype == torch.float64 else torch.float32
        self.weight = nn.Parameter(self._start())
        # Not a number until it is fitted.
        strengths = torch.full((len(self.class_names),), torch.nan, dtype=self.dtype, device=self.text.device)
        self.register_buffer("strengths", strengths)

    def _start(self) -> torch.Tensor:
        """Where the classifier starts (classes, features)."""
        if self.text.device.type == "meta":  # there are no text features without memory
            return torch.empty(len(self.class_names), self.text.num_features, dtype=self.dtype, device="meta")
        return self.raw_template_features().to(self.dtype).clone()

    def set_template(self, template: str | Sequence[str]) -> None:
        """Use the template of a data set where none was given; a classifier that has not moved starts from it.

        Raises:
            ConfigurationError: a template without {}, or one that makes a text too long; nothing is changed.
        """
        at_start = torch.equal(self.weight.detach(), self._start())
        super().set_template(template)
        if at_start:
            self.weight.data.copy_(self._start())

    def raw_template_features(self) -> torch.Tensor:
        """Frozen text features t (classes, features) of their own length."""
        return self.kept(
            "raw templates",
            lambda: raw_ensemble(self.text, self.frozen_layouts, self.chunk_size, self.fast_text),
        )

    def text_features(self) -> torch.Tensor:
        """Unit rows (classes, features) of the classifier."""
        return unit(self.weight)

    @torch.no_grad()
    def fit_features(
        self,
        train: tuple[torch.Tensor, torch.Tensor],
        validation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> dict:
        """Set how strongly each class is held.

        Args:
            train: unit image features (images, features), or (images, views, features) of several augmented views;
                labels (images,).
            validation: not used.

        Returns:
            The smallest and the largest strength, for the record of a run.

        Raises:
            ConfigurationError: no images, or a label that no class has.
        """
        if not self.constrained:
            return {}
        features, labels = (tensor.to(self.strengths.device) for tensor in train)
        check_splits(self, train)
        classes = len(self.class_names)
        with torch.inference_mode(False), torch.no_grad():
            features, labels = features.to(self.dtype, copy=True), labels.clone()
            views = features if features.ndim == 3 else features[:, None]
            probabilities = self.logits(views, unit(self._start())).softmax(dim=-1).mean(dim=1)
            right = probabilities.gather(1, labels[:, None])[:, 0]
            counts = torch.bincount(labels, minlength=classes)
            sums = torch.zeros_like(self.strengths).index_add(0, labels, right.to(self.dtype))
            self.strengths.copy_(torch.where(counts > 0, sums / counts.clamp(min=1), 1.0))
        return {"smallest_strength": self.strengths.min().item(), "largest_strength": self.strengths.max().item()}

    def loss(
        self, images: torch.Tensor | None, labels: torch.Tensor, features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy and what holds the classifier; and logits (batch, classes).

        It is not a number where `fit_features` was not called, and training stops there.
        """
        logits = self.classify(self.image_features(images) if features is None else features)
        loss = F.cross_entropy(logits, labels)
        if self.constrained:
            away = (self.weight - self.raw_template_features().to(self.weight.dtype)).square().sum(dim=-1)
            loss = loss + (self.strengths * away).mean()
        return loss, logits
