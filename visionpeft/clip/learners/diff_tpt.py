"""DiffTPT: Diverse Data Augmentation with Diffusions for Effective Test-time Prompt Tuning (Feng et al., 2023)."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.clip.learners.coop import CoOp, Position
from visionpeft.clip.learners.tpt import TPT
from visionpeft.clip.views import confident
from visionpeft.errors import ConfigurationError


class DiffTPT(TPT):
    """TPT on crops and on images that a diffusion model has made of the image, of which those that stray are left out.

    Of the views, view 0 and the share `similarity` of the others whose zero-shot logits (without SigLIP's bias, which
    is equal for all classes) have the highest cosine with those of view 0 are kept; of these, the share `selection` of
    lowest entropy is chosen. Both are done once, with the starting context. All else is as in `TPT`, which it is with
    similarity 1. Nothing is generated here: in a run `--data.generated_views FOLDER` adds the images of
    FOLDER/<class folder>/<name of the image>/ to its views.
    Tuned: M d, with text width d.
    Source: Feng et al., Diverse Data Augmentation with Diffusions for Effective Test-time Prompt Tuning, 2023, arXiv
    2308.06038. Logits share a large common part, so that the cosines are near 1 and their order alone matters.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        similarity: share of the views beside view 0 that is kept for their likeness to it.
        context_length: number M of context vectors; by default as many as `init` has tokens, 4 without `init`.
        init: a phrase to start from; None starts at N(0, 0.02^2).
        context: vectors (vectors, width), a CoOp learner or the folder of a saved one, to start from instead of `init`.
        position: where the class name stands: "end", "middle" or "front"; by default as in `context`, or at the end.
        steps: optimiser steps on each image.
        num_views: views of an image if they are drawn here, which are crops alone.
        selection: share of the kept views that is chosen; at least one is.
        lr: learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        allow_duplicates: accept two classes of one name.

    Raises:
        ConfigurationError: a similarity that is no share, or what `TPT` refuses.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        similarity: float = 0.8,
        context_length: int | None = None,
        init: str | None = "a photo of a",
        context: torch.Tensor | CoOp | str | Path | None = None,
        position: Position | None = None,
        steps: int = 4,
        num_views: int = 64,
        selection: float = 0.3,
        lr: float = 5e-3,
        weight_decay: float = 1e-2,
        allow_duplicates: bool = False,
    ):
        if not 0 <= similarity <= 1:
            raise ConfigurationError(f"similarity must be a share between 0 and 1, but is {similarity}")
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
        self.similarity = self.options["similarity"] = similarity

    def choose_views(self, features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Of the views like view 0, the most confident ones."""
        bias = getattr(self.clip, "logit_bias", None)
        scaled = logits if bias is None else logits - bias.detach().to(logits.dtype)
        likeness = F.cosine_similarity(scaled[:, 1:], scaled[:, :1], dim=-1)
        order = likeness.argsort(dim=1, descending=True, stable=True)[:, : int(likeness.shape[1] * self.similarity)]
        kept = F.pad(order + 1, (1, 0))[..., None]  # view 0 first
        return confident(features.take_along_dim(kept, 1), logits.take_along_dim(kept, 1), self.selection)
