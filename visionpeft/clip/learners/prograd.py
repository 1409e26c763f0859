"""ProGrad: Prompt-aligned Gradient for Prompt Tuning (Zhu et al., 2023), https://arxiv.org/abs/2205.14865."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.clip.gradients import gradients_of
from visionpeft.clip.layout import Tokens
from visionpeft.clip.learner import Learner
from visionpeft.clip.learners.coop import Position, check_context_length, context_prompts
from visionpeft.clip.templates import PHOTO, check_templates
from visionpeft.errors import ConfigurationError, StorageError


def project(gradient: torch.Tensor, general: torch.Tensor, strength: float) -> torch.Tensor:
    """`gradient` without what runs against `general`: g - strength <g, h> / |h|^2 h if <g, h> < 0, else g."""
    along, length = (gradient * general).sum(), general.square().sum()
    against = (along < 0) & (length > 0)
    step = torch.where(against, strength * along / length.where(against, 1), 0)
    return gradient - step * general


class ProGrad(Learner):
    """CoOp that gives up the part of its gradient that would unlearn zero-shot CLIP.

    With g the gradient of the cross-entropy and h that of T^2 KL(softmax(zero-shot / T), softmax(learner / T)) for
    logits and a temperature T, the context is trained with g where <g, h> >= 0, and with g - strength <g, h> / |h|^2 h
    otherwise. The teacher is frozen CLIP with a template. The last context vectors start at the token embeddings of the
    template's words before the class name, those before them at zero. With several processes, or batches that are
    accumulated, the gradient of each is projected by itself. Trainable: M d, with text width d.
    Source: Zhu et al., Prompt-aligned Gradient for Prompt Tuning, 2023. The authors' code counts words where it means
    tokens: of "a type of pet, a photo of a", 8 words and 9 tokens for the comma, it learns the first 8 after 8 zeros,
    and a fixed "a" stays before the name (Pets, Flowers102 and Aircraft; on Food101 a fixed "of"). `layout="published"`
    does the same; by default all 9 are learned after 7 zeros. Templates without punctuation are one in both.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        context_length: number M of context vectors.
        init: a phrase to start from; None is what the (first) template has before the class name, or
            "a photo of a" if that is nothing.
        position: where the class name stands: "end", "middle" or "front".
        strength: how much of the opposing part is taken away; 1 leaves none, 0 is CoOp.
        temperature: temperature of the comparison with the teacher.
        layout: "tokens", or "published" as above. The fixed words are those with which the training began; they are
            saved.
        template: one template or several for the teacher, with {} for the class name; None is the data set's own in a
            run, and "a photo of a {}." otherwise.
        allow_duplicates: accept two classes of one name.

    Raises:
        ConfigurationError: an unknown position or layout, fixed words where the name is not at the end, a temperature
            that is not positive, a strength outside 0 to 1, a context shorter than the phrase, or a prompt longer than
            the text tower reads.
    """

    template_style = "prograd"
    features_suffice = True

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        context_length: int = 16,
        init: str | None = None,
        position: Position = "end",
        strength: float = 1.0,
        temperature: float = 1.0,
        template: str | list[str] | None = None,
        allow_duplicates: bool = False,
        layout: Literal["tokens", "published"] = "tokens",
    ):
        if not 0 < temperature < math.inf:
            raise ConfigurationError(f"temperature must be positive and finite, but is {temperature}")
        if not 0 <= strength <= 1:
            raise ConfigurationError(f"strength must be between 0 (CoOp) and 1, but is {strength}")
        if layout not in ("tokens", "published"):
            raise ConfigurationError(f"unknown layout {layout!r} of ProGrad: choose tokens or published")
        check_context_length(context_length)
        options = {"context_length": context_length, "init": init, "position": position, "strength": strength}
        options |= {"temperature": temperature, "template": template, "layout": layout}
        super().__init__(
            clip,
            tokenizer,
            class_names,
            options=options,
            templates=PHOTO if template is None else template,
            allow_duplicates=allow_duplicates,
        )
        self.init, self.position, self.context_length = init, position, context_length
        self.strength, self.temperature = strength, temperature
        vectors, self.fixed = self.start(self.templates[0])
        self.set_class_names(class_names)
        self.vectors = nn.Parameter(vectors)

    def start(self, template: str) -> tuple[torch.Tensor, Tokens]:
        """First context vectors (vectors, width), and the fixed words between them and the class name.

        Raises:
            ConfigurationError: the phrase has more tokens than there are context vectors, or leaves fixed words where
                the name does not stand at the end.
        """
        phrase = (template.split("{}")[0] if self.init is None else self.init.replace("_", " ")).strip()
        phrase = phrase or "a photo of a"
        (tokens,) = self.tokenizer.contents([phrase])
        if len(tokens) < self.context_length:  # zeros stand before it
            (tokens,) = self.tokenizer.following([phrase])
        fixed: Tokens = ()
        if self._may_have_fixed_words:
            count = len(phrase.split())
            tokens, fixed = tokens[:count], tokens[count:]
        if fixed and self.position != "end":
            raise ConfigurationError(
                f"layout='published' keeps the last words of {phrase!r} fixed before the class name, which must stand "
                f"at the end, not at position {self.position!r}"
            )
        if not 0 < len(tokens) <= self.context_length:
            raise ConfigurationError(
                f"the phrase {phrase!r} ProGrad starts from has {len(tokens)} tokens, and context_length="
                f"{self.context_length}; a longer context or another phrase as init is needed"
            )
        dtype = torch.float64 if self.text.dtype == torch.float64 else torch.float32
        words = self.text.embed(tokens).to(dtype)
        return F.pad(words, (0, 0, self.context_length - len(words), 0)), fixed

    def set_template(self, template: str | Sequence[str]) -> None:
        """Use the template of a data set where none was given; an untrained context starts anew from its words."""
        if self.options["template"] is not None:
            return
        vectors, fixed = self.vectors.detach(), self.fixed
        if torch.equal(vectors, self.start(self.templates[0])[0]):
            vectors, fixed = self.start(check_templates(template)[0])
        layout = self.tokenizer.layout(self._prompts(self.class_names, fixed), self.class_names)
        super().set_template(template)
        self.vectors.data.copy_(vectors)
        self.fixed, self.layout = fixed, layout

    def prompts(self, names: Sequence[str]) -> list[Tokens]:
        """[v_1 .. v_M, fixed words, name, "."], with the name moved as `position` says."""
        return self._prompts(names, self.fixed)

    def _prompts(self, names: Sequence[str], fixed: Tokens) -> list[Tokens]:
        prompts = context_prompts(self.tokenizer, names, self.context_length, self.position)
        return [(*each[: self.context_length], *fixed, *each[self.context_length :]) for each in prompts]

    def trained_state(self) -> dict[str, torch.Tensor]:
        """The context and, with the layout "published", the token ids (words,) of the fixed words."""
        own = super().trained_state()
        return own | ({"fixed": torch.tensor(self.fixed, dtype=torch.long)} if self._may_have_fixed_words else {})

    def load_trained_state(self, tensors: Mapping[str, torch.Tensor], what: str) -> None:
        """Take over a saved context with its fixed words; without them, as in 0.1.0, they are those of the template.

        Raises:
            StorageError: they do not fit this learner; nothing is changed.
        """
        before = self.fixed, self.layout
        if self._may_have_fixed_words:
            tensors = {"fixed": torch.tensor(self.fixed, dtype=torch.long), **tensors}
            self._fix(tensors["fixed"], what)
        try:
            super().load_trained_state(tensors, what)
        except StorageError:
            self.fixed, self.layout = before
            raise

    @property
    def _may_have_fixed_words(self) -> bool:
        return self.options["layout"] == "published"

    def _fix(self, tokens: torch.Tensor, what: str) -> None:
        """Fix the words of these token ids (words,) from now on."""
        known = range(self.text.module.token_embedding.num_embeddings)
        sound = tokens.dtype == torch.long and tokens.ndim == 1 and all(token in known for token in tokens.tolist())
        if not sound or (len(tokens) and self.position != "end"):
            raise StorageError(
                f"the tensors of {what} do not fit: its fixed words are none of this CLIP, or out of place"
            )
        fixed = tuple(tokens.tolist())
        self.layout = self.tokenizer.layout(self._prompts(self.class_names, fixed), self.class_names)
        self.fixed = fixed
        self._kept.clear()

    def context(self) -> torch.Tensor:
        """Context vectors (1, vectors, width)."""
        return self.vectors[None]

    def loss(
        self, images: torch.Tensor | None, labels: torch.Tensor, features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A loss with the value of the cross-entropy and the projected gradient, and logits (batch, classes)."""
        features = self.image_features(images) if features is None else features
        logits = self.classify(features)
        cross_entropy = F.cross_entropy(logits, labels)
        if not torch.is_grad_enabled():
            return cross_entropy, logits
        taught = (self.logits(features, self.template_features()) / self.temperature).softmax(dim=-1)
        # Cross-entropy against the teacher has the gradient of the KL divergence.
        general = self.temperature**2 * F.cross_entropy(logits / self.temperature, taught)
        gradient = self._gradient(cross_entropy, keep_graph=True)
        gradient = project(gradient, self._gradient(general), self.strength)
        # A term that is zero and has the projected gradient: any optimiser, loss scaler or hook sees this one alone.
        return cross_entropy.detach() + ((self.vectors - self.vectors.detach()) * gradient).sum(), logits.detach()

    def _gradient(self, loss: torch.Tensor, keep_graph: bool = False) -> torch.Tensor:
        (gradient,) = gradients_of(self.text, loss, [self.vectors], keep_graph=keep_graph)
        return gradient
