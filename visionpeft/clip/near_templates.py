"""What learners share whose text features are drawn to those of a template."""

import torch
from torch import nn

from visionpeft.clip.learner import Learner


class NearTemplates(Learner):
    """Base of learners of one context: loss = cross-entropy + weight * (1 - mean_k cos(t_k, z_k)).

    t_k is the unit text feature of class k, z_k that of the data set's template.

    Attributes:
        vectors: the context (vectors, width), shared by all classes.
        weight: weight of the distance to the template.
    """

    template_style = "kgcoop"
    compares_pairs = True
    features_suffice = True
    vectors: nn.Parameter
    weight: float

    def context(self) -> torch.Tensor:
        """Context vectors (1, vectors, width)."""
        return self.vectors[None]

    def loss(
        self, images: torch.Tensor | None, labels: torch.Tensor, features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy + weight * (1 - mean_k cos(t_k, z_k)), and logits (batch, classes)."""
        features = self.image_features(images) if features is None else features
        texts = self.text_features()
        logits = self.logits(features, texts)
        return self.class_loss(logits, labels) + self.text_penalty(texts), logits

    def text_penalty(self, texts: torch.Tensor) -> torch.Tensor:
        """weight * (1 - mean_k cos(t_k, z_k)) for unit text features t (classes, features)."""
        return self.weight * (1 - (texts * self.template_features()).sum(dim=-1).mean())
