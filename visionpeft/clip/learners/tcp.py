"""TCP: Textual-based Class-aware Prompt Tuning for Vision-Language Models (Yao et al., 2024), arXiv 2311.18231."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn as nn
from open_clip.transformer import QuickGELU

from visionpeft.clip.layout import Tokens, slots
from visionpeft.clip.learners.coop import check_context_length, initial_context
from visionpeft.clip.near_templates import NearTemplates
from visionpeft.clip.packing import OwnTokens
from visionpeft.clip.templates import PHOTO, fill
from visionpeft.clip.text import unit
from visionpeft.errors import ConfigurationError

WORDS = "{}."


class TCP(NearTemplates):
    """CoOp whose learned tokens are overwritten, before a later text block, by tokens made of each class's own text.

    The prompt is [SOS] v_1 .. v_M name . [EOS], or has other `words`. Before block `layer` the M tokens after the start
    are overwritten by

        P_k = W_2 phi(W_1 z_k + b_1) + b_2  as M vectors,  phi(x) = x sigmoid(1.702 x),

    where z_k (features,) is the frozen unit text feature of the data set's template. With unit text features t_k,
    loss = cross-entropy + weight * (1 - mean_k cos(t_k, z_k)). v ~ N(0, 0.02^2), or the token embeddings of a phrase;
    the two layers start as `nn.Linear` does. New classes only need their z_k. Up to `layer` all classes share v, from
    there on the start token alone; the text tower runs what they share once.
    Trainable, with text width d and e features: M d + (e (e // 4) + e // 4) + ((e // 4) M d + M d); 331,904 on ViT-B/16
    with M = 4.
    Source: Yao et al., TCP: Textual-based Class-aware Prompt Tuning for Vision-Language Models, 2024. The authors' code
    reads a weight with which P_k would be mixed in, and then replaces it by 1, as here; its Adam needs eps=1e-3 in half
    precision, which is set outside of it. It has words of its own for each data set, as a run has: "{}, a type of pet."
    for Pets, and so on for Flowers102, Aircraft (aircraft) and Food101 (food), "{} texture." for DTD, "{}, a type of
    car" for Cars, "person doing {}." for UCF101, and "{}." for the others.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        context_length: number M of vectors; by default 4, or the number of tokens of `init`.
        init: a phrase to start from, such as "a photo of a"; None starts at random.
        layer: index of the text block before which P_k comes in; None for 8, or the last block of a shallower tower.
        weight: weight of the distance to the template.
        template: one template or several for z_k, with {} for the class name; None is the data set's own in a run, and
            "a photo of a {}." otherwise.
        allow_duplicates: accept two classes of one name.
        words: what stands after the context, with {} for the class name; None is the data set's own in a run, and
            "{}." otherwise.

    Raises:
        ConfigurationError: a weight that is negative or not finite, a layer that is no index of a text block after
            the first, words without {}, a context longer than `init`, or a prompt longer than the text tower reads.
    """

    template_style = "tcp"

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        context_length: int | None = None,
        init: str | None = None,
        layer: int | None = None,
        weight: float = 8.0,
        template: str | list[str] | None = None,
        allow_duplicates: bool = False,
        words: str | None = None,
    ):
        _check_words(WORDS if words is None else words)
        if not 0 <= weight < math.inf:
            raise ConfigurationError(f"weight must be a finite number that is not negative, but is {weight}")
        if context_length is not None:
            check_context_length(context_length)
        options = {"context_length": context_length, "init": init, "layer": layer}
        options |= {"weight": weight, "template": template, "words": words}
        super().__init__(
            clip,
            tokenizer,
            class_names,
            options=options,
            templates=PHOTO if template is None else template,
            allow_duplicates=allow_duplicates,
        )
        last = len(self.text.blocks) - 1
        self.layer = min(8, last) if layer is None else layer
        # Before block 0 nothing has read the context, so that it would learn nothing.
        if not isinstance(self.layer, int) or not 1 <= self.layer <= last:
            raise ConfigurationError(
                f"layer must be the index of a text block after the first, 1 to {last}, not {self.layer!r}"
            )
        self.weight, self.words = weight, WORDS if words is None else words
        vectors = initial_context(self, context_length, init, default=4)
        self.context_length = len(vectors)
        self.set_class_names(class_names)
        self.vectors = nn.Parameter(vectors.clone())
        features, hidden = self.text.num_features, self.text.num_features // 4
        self.meta_net = nn.Sequential(
            nn.Linear(features, hidden), QuickGELU(), nn.Linear(hidden, self.context_length * self.text.width)
        ).to(vectors)

    def prompts(self, names: Sequence[str]) -> list[Tokens]:
        """[v_1 .. v_M, the words with the name]."""
        context = slots(self.context_length)
        return [(*context, *own) for own in self.tokenizer.following(fill(self.words, name) for name in names)]

    def set_published(self, values: Mapping[str, Mapping[str, float | str]]) -> None:
        """Take over the words of the data set where none were given; a data set without has the class name and ".".

        Raises:
            ConfigurationError: words without {}, or prompts longer than the text tower reads; nothing is changed.
        """
        words = values.get("tcp", {}).get("words", WORDS) if self.options.get("words") is None else self.words
        if words == self.words:
            return
        before, self.words = self.words, _check_words(words)
        try:
            self.set_class_names(self.class_names)
        except ConfigurationError:
            self.words = before
            raise

    def taken(self) -> dict[str, dict[str, str]]:
        """The words, where they are those of a data set."""
        return {} if self.options.get("words") is not None or self.words == WORDS else {"tcp": {"words": self.words}}

    def class_tokens(self) -> torch.Tensor:
        """P (classes, vectors, width)."""
        made = self.meta_net(self.template_features().to(self.vectors.dtype))
        return made.unflatten(1, (self.context_length, self.text.width))

    def encode_text(self) -> torch.Tensor:
        """Unit text features (classes, features), computed anew."""
        own = OwnTokens(self.class_tokens(), first=len(self.tokenizer.start), block=self.layer)
        return unit(self.encode(self.layout, self.context(), own))[0]


def _check_words(words: object) -> str:
    if not isinstance(words, str) or words.count("{}") != 1:
        raise ConfigurationError(f"words {words!r} must hold {{}} exactly once, where the class name goes")
    return words
