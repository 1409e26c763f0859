"""KgCoOp: Visual-Language Prompt Tuning with Knowledge-guided Context Optimization, https://arxiv.org/abs/2303.13283."""

import math
from collections.abc import Callable, Sequence

import torch.nn as nn

from visionpeft.clip.layout import Tokens
from visionpeft.clip.learners.coop import Position, context_prompts, initial_context
from visionpeft.clip.near_templates import NearTemplates
from visionpeft.clip.templates import PHOTO
from visionpeft.errors import ConfigurationError


class KgCoOp(NearTemplates):
    """CoOp whose text features t_k are drawn to those of a hand-written template, z_k.

    loss = cross-entropy + weight * (1 - mean_k cos(t_k, z_k)). The context is that of CoOp, shared by all classes, and
    starts at the token embeddings of a phrase. Trainable: M d, with text width d.
    Source: Yao et al., Visual-Language Prompt Tuning with Knowledge-guided Context Optimization, 2023.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        context_length: number M of context vectors; by default as many as `init` has tokens, 4 without `init`.
        init: a phrase to start from; None starts at N(0, 0.02^2).
        position: where the class name stands: "end", "middle" or "front".
        weight: weight of the distance to the template.
        template: one template or several for z_k, with {} for the class name; None is the data set's own in a run, and
            "a photo of a {}." otherwise.
        allow_duplicates: accept two classes of one name.

    Raises:
        ConfigurationError: an unknown position, a weight that is negative or not finite, a context longer than
            `init`, or a prompt longer than the text tower reads.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        context_length: int | None = None,
        init: str | None = "a photo of a",
        position: Position = "end",
        weight: float = 8.0,
        template: str | list[str] | None = None,
        allow_duplicates: bool = False,
    ):
        if not 0 <= weight < math.inf:
            raise ConfigurationError(f"weight must be a finite number that is not negative, but is {weight}")
        options = {"context_length": context_length, "init": init, "position": position}
        options |= {"weight": weight, "template": template}
        super().__init__(
            clip,
            tokenizer,
            class_names,
            options=options,
            templates=PHOTO if template is None else template,
            allow_duplicates=allow_duplicates,
        )
        self.position, self.weight = position, weight
        vectors = initial_context(self, context_length, init, default=4)
        self.context_length = len(vectors)
        self.set_class_names(class_names)
        self.vectors = nn.Parameter(vectors.clone())

    def prompts(self, names: Sequence[str]) -> list[Tokens]:
        """[v_1 .. v_M, name, "."], with the name moved as `position` says."""
        return context_prompts(self.tokenizer, names, self.context_length, self.position)
