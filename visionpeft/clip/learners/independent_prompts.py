"""What IVLP and PromptSRC share: prompts in the first blocks of both towers, each tower with its own."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from visionpeft.clip.layout import Tokens
from visionpeft.clip.learner import Learner
from visionpeft.clip.phrase import Phrase, depth_within
from visionpeft.methods.parts.base import snake_case
from visionpeft.methods.parts.deep_prompts import DeepPrompts


class IndependentPrompts(Learner):
    """Base of learners with prompts of `DeepPrompts`, whose text context v takes the place of the first words.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        num_text: text prompts per block; 0 for none, so that the text features are fixed.
        num_visual: image prompts per block; 0 for none, so that the image features are fixed.
        depth_text: number of text blocks with their own prompts, or None.
        depth_visual: the same for the image tower.
        default_depth: the depth where None is given, as far as there are blocks.
        init: see `Phrase`.
        **others: for `Learner`.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        *,
        num_text: int,
        num_visual: int,
        depth_text: int | None,
        depth_visual: int | None,
        default_depth: int,
        init: str | None,
        **others,
    ):
        super().__init__(clip, tokenizer, class_names, **others)
        self.phrase = Phrase(self, num_text, init)
        self.set_class_names(class_names)
        method = DeepPrompts(
            num_text=num_text,
            num_visual=num_visual,
            depth_text=depth_within(self, depth_text, default_depth, "text"),
            depth_visual=depth_within(self, depth_visual, default_depth, "visual"),
            text_start=len(self.tokenizer.start),
        )
        self.adapter_name = snake_case(type(self).__name__)
        if num_visual or method.depth_text > 1:
            self.adapt(method)
        self.frozen_images = num_visual == 0
        self.vectors = nn.Parameter(self.phrase.vectors()) if num_text else None
        self.train()

    def prompts(self, names: Sequence[str]) -> list[Tokens]:
        """[v, further words of `init`, name, "."]."""
        return self.phrase.prompts(names)

    def context(self) -> torch.Tensor | None:
        """The text prompt of block 0, (1, num_text, width), None if there is none."""
        return None if self.vectors is None else self.vectors[None]

    def text_features(self) -> torch.Tensor:
        """Unit text features (classes, features)."""
        return super().text_features() if self.vectors is not None else self.kept("text", self.encode_text)
