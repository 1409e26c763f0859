"""C-TPT: Calibrated Test-Time Prompt Tuning for Vision-Language Models (Yoon et al., 2024), arXiv 2403.14119."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn as nn

from visionpeft.clip.learners.coop import CoOp, Position
from visionpeft.clip.learners.tpt import TPT
from visionpeft.errors import ConfigurationError


class CTPT(TPT):
    """TPT that also spreads the text features, for better calibrated probabilities: its loss less weight * D.

    D = mean_k |t_k - mean_j t_j| of the unit text features t of the image's own context. All else is as in `TPT`, which
    it is with weight 0. Tuned: M d, with text width d.
    Source: Yoon et al., C-TPT: Calibrated Test-Time Prompt Tuning for Vision-Language Models via Text Feature
    Dispersion, 2024. From a fresh AdamW one step moves each value by the learning rate, so the weight decides its sign
    alone.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        weight: of D; the authors take 50, and 20 for ImageNet and its variants.
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
        ConfigurationError: a weight that is negative, or what `TPT` refuses.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        weight: float = 50.0,
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
        if not 0 <= weight < math.inf:
            raise ConfigurationError(f"weight must be a finite number that is not negative, but is {weight}")
        super().__init__(
            clip,
            tokenizer,
            class_names,
            context_length=context_length,
            init=init,
            context=context,
            position=position,
            steps=steps,
            num_views=num_views,
            selection=selection,
            lr=lr,
            weight_decay=weight_decay,
            allow_duplicates=allow_duplicates,
        )
        self.weight = self.options["weight"] = weight

    def objective(self, features: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Entropy of TPT less weight * D, of each image (batch,)."""
        return super().objective(features, texts) - self.weight * dispersion(texts)


def dispersion(texts: torch.Tensor) -> torch.Tensor:
    """D (...): mean distance of text features (..., classes, features) from their mean."""
    return (texts - texts.mean(dim=-2, keepdim=True)).norm(dim=-1).mean(dim=-1)
