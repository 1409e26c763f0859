"""CoOp: Learning to Prompt for Vision-Language Models (Zhou et al., 2021), https://arxiv.org/abs/2109.01134."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn as nn

from visionpeft.clip.layout import Tokenizer, Tokens, slots
from visionpeft.clip.learner import Learner
from visionpeft.errors import ConfigurationError

Position = Literal["end", "middle", "front"]


def check_context_length(length: int) -> None:
    """Refuse what is no number of context vectors.

    Raises:
        ConfigurationError: not an integer, or less than 1.
    """
    if not isinstance(length, int) or length < 1:
        raise ConfigurationError(f"context_length must be an integer of at least 1, not {length!r}")


def initial_context(learner: Learner, context_length: int | None, init: str | None, default: int) -> torch.Tensor:
    """First context vectors (vectors, width): the token embeddings of a phrase, or N(0, 0.02^2).

    Args:
        learner: whose CLIP embeds the phrase.
        context_length: number of vectors; with a phrase, at most its number of tokens, None for all of them.
        init: the phrase, or None for random vectors.
        default: number of random vectors if `context_length` is None.

    Raises:
        ConfigurationError: no vectors, or more than the phrase has tokens.
    """
    if context_length is not None:
        check_context_length(context_length)
    dtype = torch.float64 if learner.text.dtype == torch.float64 else torch.float32
    if init is None:
        return torch.randn(context_length or default, learner.text.width, dtype=dtype).to(learner.text.device) * 0.02
    (phrase,) = learner.tokenizer.contents([init.replace("_", " ")])
    if not phrase:
        raise ConfigurationError(f"init={init!r} has no words; give a phrase such as 'a photo of a', or None")
    length = context_length or len(phrase)
    if length > len(phrase):
        raise ConfigurationError(
            f"context_length={length}, but init={init!r} has {len(phrase)} tokens; leave context_length out to learn "
            "them all, or init out to start from random vectors"
        )
    return learner.text.embed(phrase[:length]).to(dtype)


def context_prompts(
    tokenizer: Tokenizer,
    names: Sequence[str],
    length: int,
    position: Position = "end",
    class_specific: bool = False,
) -> list[Tokens]:
    """[v_1 .. v_M, name, "."] for each name, with the name moved as `position` says.

    Args:
        tokenizer: the tokenizer.
        names: class names.
        length: number M of context vectors.
        position: where the name stands.
        class_specific: the second class uses the vectors M + 1 .. 2 M, and so on.

    Raises:
        ConfigurationError: an unknown position.
    """
    if position not in ("end", "middle", "front"):
        raise ConfigurationError(f"position {position!r} must be end, middle or front")
    split = {"end": length, "middle": length // 2, "front": 0}[position]
    read = tokenizer.following if split else tokenizer.contents
    # A name such as "ram (adult male sheep)" merges with the full stop: ")." is one token, which moves with the name.
    sentences = read(f"{name}." for name in names)
    prompts = []
    for index, (sentence, name) in enumerate(zip(sentences, read(names), strict=True)):
        context = slots(length, length * index if class_specific else 0)
        prompts.append((*context[:split], *sentence[: len(name)], *context[split:], *sentence[len(name) :]))
    return prompts


class CoOp(Learner):
    """Learns context vectors v before (or around) the class name: [SOS] v_1 .. v_M name . [EOS].

    The prompt ends with a full stop. `middle` puts the name after the first floor(M / 2) vectors, `front` before
    all. The vectors are shared by all classes or, class-specific, each class has its own. N(0, 0.02^2), or the token
    embeddings of a phrase. Trainable: M d, or classes * M d, with text width d.
    Source: Zhou et al., Learning to Prompt for Vision-Language Models, 2021.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        context_length: number M of context vectors; by default 16, or the number of tokens of `init`.
        init: a phrase to start from, such as "a photo of a"; None starts at random.
        position: where the class name stands: "end", "middle" or "front".
        class_specific: a context for each class; it can then not be used with other classes.
        allow_duplicates: accept two classes of one name.

    Raises:
        ConfigurationError: an unknown position, a context longer than `init`, or a prompt longer than the text tower.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        context_length: int | None = None,
        init: str | None = None,
        position: Position = "end",
        class_specific: bool = False,
        allow_duplicates: bool = False,
    ):
        options = {"context_length": context_length, "init": init, "position": position}
        options |= {"class_specific": class_specific}
        super().__init__(clip, tokenizer, class_names, options=options, allow_duplicates=allow_duplicates)
        self.position = position
        self.class_bound = class_specific
        vectors = initial_context(self, context_length, init, default=16)
        self.context_length = len(vectors)
        self.set_class_names(class_names)
        if class_specific and init is None:
            vectors = torch.randn(len(self.class_names), *vectors.shape).to(vectors) * 0.02
        elif class_specific:
            vectors = vectors.expand(len(self.class_names), -1, -1)
        self.vectors = nn.Parameter(vectors.clone())

    def prompts(self, names: Sequence[str]) -> list[Tokens]:
        """[v_1 .. v_M, name, "."], with the name moved as `position` says."""
        return context_prompts(self.tokenizer, names, self.context_length, self.position, self.class_bound)

    def context(self) -> torch.Tensor:
        """Context vectors (1, vectors, width); class-specific ones follow each other class by class."""
        return self.vectors.flatten(0, -2)[None]
