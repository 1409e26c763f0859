"""CoCoOp: Conditional Prompt Learning for Vision-Language Models (Zhou et al., 2022), https://arxiv.org/abs/2203.05557."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from visionpeft.clip.layout import Tokens
from visionpeft.clip.learner import Learner
from visionpeft.clip.learners.coop import context_prompts, initial_context
from visionpeft.clip.text import unit
from visionpeft.errors import ConfigurationError


class CoCoOp(Learner):
    """Learns context vectors that each image shifts: v_m(x) = v_m + W_2 relu(W_1 f(x) + b_1) + b_2, the same for all m.

    f(x) is the unit image feature (features,). The prompt of image and class is [SOS] v_1(x) .. v_M(x) name . [EOS], so
    that every image has its own text features of all classes. The vectors start at the token embeddings of a phrase,
    the two layers as `nn.Linear` does. Trainable: M d + (e h + h) + (h d + d) with text width d, e features and
    h = e // 16.
    Source: Zhou et al., Conditional Prompt Learning for Vision-Language Models, 2022.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        context_length: number M of context vectors; by default as many as `init` has tokens, 4 without `init`.
        init: a phrase to start from; None starts at N(0, 0.02^2).
        allow_duplicates: accept two classes of one name.

    Raises:
        ConfigurationError: a context longer than `init`, or a prompt longer than the text tower reads.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        context_length: int | None = None,
        init: str | None = "a photo of a",
        allow_duplicates: bool = False,
    ):
        options = {"context_length": context_length, "init": init}
        super().__init__(clip, tokenizer, class_names, options=options, allow_duplicates=allow_duplicates)
        vectors = initial_context(self, context_length, init, default=4)
        self.context_length = len(vectors)
        self.set_class_names(class_names)
        self.vectors = nn.Parameter(vectors.clone())
        features = self.text.num_features
        self.meta_net = nn.Sequential(
            nn.Linear(features, features // 16), nn.ReLU(), nn.Linear(features // 16, self.text.width)
        ).to(vectors)

    def prompts(self, names: Sequence[str]) -> list[Tokens]:
        """[v_1 .. v_M, name, "."]."""
        return context_prompts(self.tokenizer, names, self.context_length)

    def context(self, image_features: torch.Tensor | None = None) -> torch.Tensor:
        """Context vectors (batch, vectors, width) for unit image features (batch, features).

        Raises:
            ConfigurationError: no image features.
        """
        if image_features is None:
            raise ConfigurationError(
                "the texts of CoCoOp depend on the image; pass image_features (batch, features), or the images to the "
                "learner itself"
            )
        return self.vectors + self.meta_net(image_features.to(self.vectors.dtype))[:, None]

    def text_features(self, image_features: torch.Tensor | None = None) -> torch.Tensor:
        """Unit text features (batch, classes, features) for unit image features (batch, features).

        Raises:
            ConfigurationError: no image features.
        """
        return unit(self.encode(self.layout, self.context(image_features)))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of unit image features (batch, features)."""
        return self.logits(features[:, None], self.text_features(features))[:, 0]
