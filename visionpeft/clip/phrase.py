"""Prompts whose first words are learned and whose further words stay: "a photo" learned, "of a dog." fixed."""

from collections.abc import Sequence

import torch

from visionpeft.adapters.switch import plain
from visionpeft.backbones.whole_model import describe
from visionpeft.clip.layout import Tokens, slots
from visionpeft.clip.learner import Learner
from visionpeft.errors import ConfigurationError


class Phrase:
    """The words before the class name: [v_1 .. v_n, further words, name "."].

    Args:
        learner: whose tokenizer and CLIP read the words.
        num_tokens: number n of learned vectors; 0 keeps all words.
        init: words of which the first n are learned. If they are fewer, or None, the vectors start at random and no
            fixed words follow.

    Raises:
        ConfigurationError: a negative number of vectors, or neither vectors nor words.
    """

    def __init__(self, learner: Learner, num_tokens: int, init: str | None):
        if not isinstance(num_tokens, int) or num_tokens < 0:
            raise ConfigurationError(
                f"the number of learned text tokens must be an integer that is not negative, but is {num_tokens!r}"
            )
        (words,) = learner.tokenizer.contents([(init or "").replace("_", " ")])
        if not num_tokens and not words:
            raise ConfigurationError("without learned text tokens, init must have words, such as 'a photo of a'")
        self.learner = learner
        self.num_tokens = num_tokens
        self.random = len(words) < num_tokens
        self.learned: Tokens = () if self.random else words[:num_tokens]
        self.fixed: Tokens = () if self.random else words[num_tokens:]

    def vectors(self) -> torch.Tensor:
        """First vectors (num_tokens, width): embedded words, or N(0, 0.02^2)."""
        text = self.learner.text
        dtype = torch.float64 if text.dtype == torch.float64 else torch.float32
        if self.random:
            return torch.randn(self.num_tokens, text.width, dtype=dtype).to(text.device) * 0.02
        return text.embed(self.learned).to(dtype)

    def prompts(self, names: Sequence[str]) -> list[Tokens]:
        """Tokens and slots of the prompt of each class."""
        contents = self.learner.tokenizer.following(f"{name}." for name in names)
        return [(*slots(self.num_tokens), *self.fixed, *content) for content in contents]


def depth_within(learner: Learner, depth: int | None, default: int, *towers: str) -> int:
    """A depth that was given, or else the default, as far as these towers have blocks.

    Raises:
        ConfigurationError: a depth that is not an integer.
    """
    if depth is not None:
        if not isinstance(depth, int):
            raise ConfigurationError(f"depth must be an integer, the number of blocks with prompts, not {depth!r}")
        return depth
    with plain(learner.clip):
        described = describe(learner.clip).towers
    return min([default, *(described[name].depth for name in towers if name in described)])
