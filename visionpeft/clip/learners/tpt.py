"""TPT: Test-Time Prompt Tuning for Zero-Shot Generalization in Vision-Language Models, https://arxiv.org/abs/2209.07511."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn as nn

from visionpeft.clip.description import read_saved
from visionpeft.clip.gradients import gradients_of
from visionpeft.clip.layout import Tokens
from visionpeft.clip.learner import Learner
from visionpeft.clip.learners.coop import CoOp, Position, context_prompts, initial_context
from visionpeft.clip.model import check_same_clip
from visionpeft.clip.text import unit
from visionpeft.clip.views import check_views, confident, features_of_views, marginal_entropy
from visionpeft.errors import ConfigurationError, StorageError


class TPT(Learner):
    """Tunes a context on each test image alone, by making the predictions for several views of it agree.

    Of the views of an image (view 0 is plain), those whose predictions have the lowest entropy are chosen once; the
    loss is the entropy of the mean of their predicted probabilities. From the starting context and a fresh AdamW,
    `steps` steps are made, view 0 is classified, and the context is forgotten. Images of a batch are tuned side by side
    and do not see each other. Labels are never used; nothing is trained. Tuned: M d, with text width d.
    Source: Shu et al., Test-Time Prompt Tuning for Zero-Shot Generalization in Vision-Language Models, 2022.

    The learner takes views (batch, views, 3, height, width). For images (batch, 3, height, width) it draws the other
    views itself: random crops of 8 to 100 % of the prepared image, resized bilinearly and flipped at random.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        context_length: number M of context vectors; by default as many as `init` has tokens, 4 without `init`.
        init: a phrase to start from; None starts at N(0, 0.02^2).
        context: vectors (vectors, width), a CoOp learner or the folder of a saved one, to start from instead of `init`.
        position: where the class name stands: "end", "middle" or "front"; by default as in `context`, or at the end.
        steps: optimiser steps on each image.
        num_views: views of an image if they are drawn here.
        selection: share of the views that is chosen; at least one is.
        lr: learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        allow_duplicates: accept two classes of one name.

    Raises:
        ConfigurationError: a context that does not fit the text tower, an unknown position, a number that makes no
            sense, or a prompt longer than the text tower reads.
    """

    # Views are drawn anew, so that image features cannot be kept.
    frozen_images = False
    by_gradient = False
    adapts_while_testing = True
    started_from = ("context",)

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        context_length: int | None = None,
        init: str | None = "a photo of a",
        context: torch.Tensor | CoOp | str | Path | None = None,
        position: Position | None = None,
        steps: int = 1,
        num_views: int = 64,
        selection: float = 0.1,
        lr: float = 5e-3,
        weight_decay: float = 1e-2,
        allow_duplicates: bool = False,
    ):
        whole = isinstance(steps, int) and isinstance(num_views, int)
        if not whole or steps < 1 or num_views < 1 or not 0 < selection <= 1:
            raise ConfigurationError(
                "TPT needs at least one step and one view, as integers, and a selection between 0 and 1, not "
                f"steps={steps}, num_views={num_views}, selection={selection}"
            )
        if lr < 0 or weight_decay < 0:
            raise ConfigurationError(f"lr and weight_decay must not be negative, not {lr} and {weight_decay}")
        if isinstance(context, str | Path):
            context, saved_position = read_context(context, clip)
            position = position or saved_position
        position = position or getattr(context, "position", "end")
        options = {"context_length": context_length, "init": init if context is None else None, "position": position}
        options |= {"steps": steps, "num_views": num_views, "selection": selection}
        options |= {"lr": lr, "weight_decay": weight_decay}
        super().__init__(clip, tokenizer, class_names, options=options, allow_duplicates=allow_duplicates)
        self.position, self.steps, self.num_views, self.selection = position, steps, num_views, selection
        self.lr, self.weight_decay = lr, weight_decay
        if context is None:
            vectors = initial_context(self, context_length, init, default=4)
        else:
            vectors = self._given_context(context, context_length)
        self.context_length = options["context_length"] = len(vectors)
        self.set_class_names(class_names)
        self.vectors = nn.Parameter(vectors.clone())

    def _given_context(self, context: torch.Tensor | CoOp, context_length: int | None) -> torch.Tensor:
        vectors = context if isinstance(context, torch.Tensor) else getattr(context, "vectors", None)
        if vectors is None:
            raise ConfigurationError(
                f"context must be vectors, a CoOp learner or the folder of a saved one, not {context!r}"
            )
        if vectors.ndim != 2 or vectors.shape[1] != self.text.width or context_length not in (None, len(vectors)):
            raise ConfigurationError(
                f"the starting context must be (vectors, {self.text.width}) and shared by all classes, with as many "
                f"vectors as context_length, not {tuple(vectors.shape)}"
            )
        dtype = torch.float64 if self.text.dtype == torch.float64 else torch.float32
        return vectors.detach().to(self.text.device, dtype)

    @property
    def num_tuned(self) -> int:
        """Number of values tuned on each image."""
        return self.vectors.numel()

    def prompts(self, names: Sequence[str]) -> list[Tokens]:
        """[v_1 .. v_M, name, "."], with the name moved as `position` says."""
        return context_prompts(self.tokenizer, names, self.context_length, self.position)

    def context(self) -> torch.Tensor:
        """Starting context vectors (1, vectors, width)."""
        return self.vectors[None]

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Unit features (batch, views, features) of views (batch, views, 3, height, width), or of images."""
        return features_of_views(self, images, self.num_views)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of view 0, after tuning on the unit features (batch, views, features) of all views.

        Raises:
            ConfigurationError: features of one view only, without which there is nothing to tune.
        """
        check_views(self, features)
        # Lightning tests in inference mode, where no gradient exists.
        with torch.inference_mode(False):
            features = features.detach().clone()
            context = self.tune(features)
            with torch.no_grad():
                texts = unit(self.encode(self.layout, context))
                return self.logits(features[:, :1], texts)[:, 0]

    def tune(self, features: torch.Tensor) -> torch.Tensor:
        """Contexts (batch, vectors, width), each tuned on the unit features (batch, views, features) of one image."""
        context = self.vectors.detach().repeat(len(features), 1, 1).requires_grad_()
        # AdamW acts on every value by itself, so that one optimiser for all images is one for each.
        optimizer = torch.optim.AdamW([context], lr=self.lr, weight_decay=self.weight_decay)
        chosen = None
        for step in range(self.steps):
            with torch.enable_grad():
                if step == 0:
                    start, graph = self._first_texts()
                    texts = graph.detach().repeat(len(features), 1, 1).requires_grad_()
                else:
                    graph = unit(self.encode(self.layout, context))
                    texts = graph.detach().requires_grad_()
                if chosen is None:
                    chosen = self.choose_views(features, self.logits(features, texts.detach()))
                loss = self.objective(chosen, texts).sum()
                (upstream,) = torch.autograd.grad(loss, texts)
            if step == 0:
                # One way back for each image, through the one graph.
                gradients = [gradients_of(self.text, graph, [start], one, keep_graph=True)[0] for one in upstream]
                context.grad = torch.stack(gradients)
            else:
                (context.grad,) = gradients_of(self.text, graph, [context], upstream)
            optimizer.step()
        return context.detach()

    def choose_views(self, features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Unit features (batch, chosen views, features) of the views that an image is tuned on.

        Args:
            features: unit features (batch, views, features).
            logits: those of the starting context (batch, views, classes).
        """
        return confident(features, logits, self.selection)

    def objective(self, features: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """What is made small for each image (batch,).

        Args:
            features: unit features (batch, chosen views, features).
            texts: unit text features (batch, classes, features), of the context of each image.
        """
        return marginal_entropy(self.logits(features, texts))

    def _first_texts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Starting context and its unit text features (classes, features), with the graph between them.

        They are the same for every image, so that an image only costs the way back.
        """

        def compute() -> tuple[torch.Tensor, torch.Tensor]:
            start = self.vectors.detach().clone().requires_grad_()
            return start, unit(self.encode(self.layout, start[None]))[0]

        return self.kept("graph", compute, [self.vectors], with_graph=True)


def read_context(folder: str | Path, clip: nn.Module) -> tuple[torch.Tensor, Position]:
    """Context vectors (vectors, width) and position of a CoOp learner saved in a folder.

    Raises:
        StorageError: the folder holds no CoOp learner, or one of another CLIP or of one with other adapters.
    """
    description, tensors = read_saved(folder)
    if description["learner"]["class"] != "CoOp" or "vectors" not in tensors:
        raise StorageError(f"TPT can start from a CoOp learner, and in {folder} is a {description['learner']['class']}")
    check_same_clip(clip, description, f"the learner in {folder}")
    return tensors["vectors"], description["learner"]["options"].get("position", "end")
