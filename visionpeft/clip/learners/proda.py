"""ProDA: Prompt Distribution Learning (Lu et al., 2022), https://arxiv.org/abs/2205.03340."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.clip.layout import Tokens, slots
from visionpeft.clip.learner import Learner
from visionpeft.clip.learners.coop import Position, check_context_length, context_prompts
from visionpeft.clip.text import unit
from visionpeft.errors import ConfigurationError


class ProDA(Learner):
    """Learns a distribution of classifiers: many contexts, whose text features have a mean and a covariance.

    Of the K contexts a quarter has the class name at the front, a quarter in the middle, the others at the end. With
    unit text features t_kn of class k with context n, their mean m_k over the contexts (not normalised again) and the
    covariance S_kj = sum_n (t_kn - m_k) (t_jn - m_j) / (contexts + 1), for each feature by itself, the loss of an image
    f of class y is the cross-entropy of

        scale f m_k + scale^2 / 2 * sum of f^2 (S_yy + S_kk - 2 S_yk),

    an upper bound of the expected cross-entropy of Gaussian classifiers, plus `orthogonality` times the mean |cos|
    between the text features of different contexts without a name: [SOS] v_1 .. v_M . [EOS]. It predicts by scale f
    m_k. While training, each loss takes `contexts_per_step` contexts, drawn in the shares of the positions. All start
    at N(0, 0.02^2).
    Trainable: K M d, with context length M and text width d.
    Source: Lu et al., Prompt Distribution Learning, 2022. The authors have published no code: the divisor of the
    covariance and the contexts without a name are those of a re-implementation, the weight is the paper's, recalled.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        num_contexts: number K of contexts, a multiple of 4.
        context_length: number M of vectors of each.
        contexts_per_step: how many a training step takes, a multiple of 4; at most K.
        orthogonality: weight of the term that keeps contexts apart.
        allow_duplicates: accept two classes of one name.

    Raises:
        ConfigurationError: a number out of range, or a prompt longer than the text tower.
    """

    features_suffice = True

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        num_contexts: int = 32,
        context_length: int = 16,
        contexts_per_step: int = 4,
        orthogonality: float = 0.1,
        allow_duplicates: bool = False,
    ):
        check_context_length(context_length)
        counts = (num_contexts, contexts_per_step)
        if not all(isinstance(n, int) and n > 0 and n % 4 == 0 for n in counts) or contexts_per_step > num_contexts:
            raise ConfigurationError(
                "num_contexts and contexts_per_step must be multiples of 4 (a quarter has the name at the front), "
                f"and contexts_per_step at most num_contexts, not {num_contexts} and {contexts_per_step}"
            )
        if not 0 <= orthogonality < math.inf:
            raise ConfigurationError(f"orthogonality must be a number that is not negative, not {orthogonality}")
        options = {"num_contexts": num_contexts, "context_length": context_length}
        options |= {"contexts_per_step": contexts_per_step, "orthogonality": orthogonality}
        super().__init__(clip, tokenizer, class_names, options=options, allow_duplicates=allow_duplicates)
        self.num_contexts, self.context_length = num_contexts, context_length
        self.contexts_per_step, self.orthogonality = contexts_per_step, orthogonality
        self.set_class_names(class_names)
        dtype = torch.float64 if self.text.dtype == torch.float64 else torch.float32
        vectors = torch.randn(num_contexts, context_length, self.text.width, dtype=dtype) * 0.02
        self.vectors = nn.Parameter(vectors.to(self.text.device))  # those with the name at the front come first

    def set_class_names(self, class_names: Sequence[str]) -> None:
        """Classify into other classes with what has been learnt; nothing is changed if the names are refused.

        Raises:
            ConfigurationError: names that cannot be used.
        """
        super().set_class_names(class_names)
        # Moving the name does not make a prompt longer, so that none of these is refused where the first was not.
        self.layouts = [
            self.tokenizer.layout(self._prompts_at(position, self.class_names), self.class_names)
            for position in ("front", "middle", "end")
        ]
        (stop,) = self.tokenizer.contents(["."])
        self.nameless = self.tokenizer.layout([(*slots(self.context_length), *stop)], ["no class"])

    def _prompts_at(self, position: Position, names: Sequence[str]) -> list[Tokens]:
        return context_prompts(self.tokenizer, names, self.context_length, position)

    def prompts(self, names: Sequence[str]) -> list[Tokens]:
        """[v_1 .. v_M, name, "."], of the contexts with the name at the end."""
        return self._prompts_at("end", names)

    def context(self) -> torch.Tensor:
        """Context vectors (contexts, vectors, width)."""
        return self.vectors

    def features_of(self, chosen: torch.Tensor | None = None) -> torch.Tensor:
        """Unit text features (contexts, classes, features) of the contexts of these indices, all by default.

        Args:
            chosen: indices (contexts,), sorted, with a quarter each in the first quarter and in the second.
        """
        vectors = self.vectors if chosen is None else self.vectors[chosen]
        quarter = len(vectors) // 4
        parts = vectors.split([quarter, quarter, 2 * quarter])
        return unit(torch.cat([self.encode(layout, part) for layout, part in zip(self.layouts, parts, strict=True)]))

    def encode_text(self) -> torch.Tensor:
        """Mean text features (classes, features) over all contexts, shorter than 1."""
        return self.features_of().mean(dim=0)

    def draw(self) -> torch.Tensor:
        """Indices (contexts_per_step,) of contexts for a training step, in the shares of the positions."""
        quarter, count = self.num_contexts // 4, self.contexts_per_step // 4
        device = self.vectors.device
        drawn = [
            start + torch.randperm(size, device=device)[:number].sort().values
            for start, size, number in (
                (0, quarter, count),
                (quarter, quarter, count),
                (2 * quarter, 2 * quarter, 2 * count),
            )
        ]
        return torch.cat(drawn)

    def loss(
        self, images: torch.Tensor | None, labels: torch.Tensor, features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The bound with the term that keeps contexts apart; and logits (batch, classes) of the mean classifier.

        In training mode they are of the contexts drawn for this step, otherwise of all.
        """
        features = self.image_features(images) if features is None else features
        chosen = self.draw() if self.training and self.contexts_per_step < self.num_contexts else None
        texts = self.features_of(chosen)
        logits = self.logits(features, texts.mean(dim=0))
        with torch.autocast(features.device.type, enabled=False):
            scale = self.scale.to(texts.dtype)
            spread = scale.square() / 2 * spreads(texts, features.to(texts.dtype), labels)
        loss = F.cross_entropy(logits + spread, labels)
        if self.orthogonality:
            loss = loss + self.orthogonality * self.likeness(chosen)
        return loss, logits

    def likeness(self, chosen: torch.Tensor | None = None) -> torch.Tensor:
        """Mean |cos| between the text features of different contexts without a name, but with the full stop."""
        vectors = self.vectors if chosen is None else self.vectors[chosen]
        alone = unit(self.encode(self.nameless, vectors))[:, 0]
        cosines = (alone @ alone.mT).abs()
        return (cosines.sum() - cosines.diagonal().sum()) / (len(alone) * (len(alone) - 1))


def spreads(texts: torch.Tensor, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """f^2 (S_yy + S_kk - 2 S_yk) (batch, classes), summed over the features.

    S_yy + S_kk - 2 S_yk is the variance of t_y - t_k over the contexts, so that no covariance of all classes is made
    for each feature: with the weights f^2 it is |g_y - g_k|^2 summed over the contexts, for g_kn = f (t_kn - m_k).

    Args:
        texts: text features (contexts, classes, features).
        features: image features (batch, features).
        labels: (batch,).
    """
    away = texts - texts.mean(dim=0)
    weights = features.square()
    # |g_y|^2 + |g_k|^2 - 2 g_y g_k, each (batch, classes)
    lengths = weights @ away.square().sum(dim=0).mT
    own = away[:, labels]  # (contexts, batch, features)
    together = torch.einsum("nbd,nkd->bk", own * weights, away)
    own_length = lengths.gather(1, labels[:, None])
    return (own_length + lengths - 2 * together) / (len(texts) + 1)
