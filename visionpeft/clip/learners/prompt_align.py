"""PromptAlign: Align Your Prompts, Test-Time Prompting with Distribution Alignment for Zero-Shot Generalization."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.clip.description import read_saved
from visionpeft.clip.gradients import gradients_of
from visionpeft.clip.learners.maple import MaPLe
from visionpeft.clip.model import check_same_clip
from visionpeft.clip.source_statistics import Moments, moments_of, read_moments, watched_blocks
from visionpeft.clip.text import unit
from visionpeft.clip.views import (
    by_confidence,
    check_selection,
    features_of_views,
    marginal_entropy,
    number_chosen,
    views_of,
)
from visionpeft.errors import ConfigurationError, StorageError

HOW = (
    "python -m visionpeft.prepare statistics --run RUN --images FOLDER --output STATISTICS computes them from a run of "
    "MaPLe and the images it was trained on; then give statistics=STATISTICS"
)


class PromptAlign(MaPLe):
    """Tunes the prompts of `MaPLe` on each test image alone: TPT's entropy, and tokens like those of the source.

    The loss is that of `TPT` on the chosen views plus weight * D. D is the mean over the blocks l with prompts of their
    own of |m_l - s_l| / 2 + |v_l - u_l| / 2, averaged over tokens and channels: m and v are mean and variance (divided
    by the number of views) of the tokens that enter block l, its prompts among them, over the chosen views; s and u are
    those of the source's images. All that MaPLe trains is tuned, text and image prompts and the maps between them:
    `steps` steps of a fresh AdamW; view 0 is classified, and all is put back. Views are chosen once, without a graph;
    only those chosen pass the image tower with one. Images do not see each other.
    Tuned, with text width d and image width D: depth * (num_tokens * d + d * D + D); 1,185,024 on ViT-B/16, depth 3.
    Source: Abdul Samadh et al., Align Your Prompts, 2023, arXiv 2311.01459. Their code leaves out the last of the
    blocks and still divides by their number; here all count.

    Args:
        clip: an OpenCLIP model whose towers are transformers. It gets an adapter named "maple".
        tokenizer: its tokenizer.
        class_names: names of the classes.
        maple: folder of a saved `MaPLe` to start from, whose prompts, depth and words are taken; None starts as MaPLe
            does.
        statistics: folder of the source statistics that the command `prepare statistics` wrote.
        weight: of D; 0 needs no statistics.
        steps: optimiser steps on each image.
        num_views: views of an image if they are drawn here.
        selection: share of the views that is chosen; at least one is.
        lr: learning rate of AdamW; the authors take 5e-4, and 4e-2 for ImageNet and its variants.
        weight_decay: weight decay of AdamW.
        num_tokens: without `maple`, prompts per block in each tower.
        depth: without `maple`, number of blocks with prompts of their own; None for 3, or all of a shallower tower.
        init: without `maple`, words before the class name, as in `MaPLe`.
        allow_duplicates: accept two classes of one name.

    Raises:
        UnsupportedError: a tower is no transformer with sited blocks, such as a ResNet.
        ConfigurationError: a number out of range, or what `MaPLe` refuses; when it is used, statistics are missing.
        StorageError: a folder does not hold what it should, or what belongs to another CLIP or other prompts.
    """

    by_gradient = False
    adapts_while_testing = True
    started_from = ("maple", "statistics")
    default_depth = 3

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        maple: str | Path | None = None,
        statistics: str | Path | None = None,
        weight: float = 100.0,
        steps: int = 1,
        num_views: int = 64,
        selection: float = 0.1,
        lr: float = 5e-4,
        weight_decay: float = 1e-2,
        num_tokens: int = 2,
        depth: int | None = None,
        init: str | None = "a photo of a",
        allow_duplicates: bool = False,
    ):
        check_selection(selection, num_views)
        if not isinstance(steps, int) or steps < 1:
            raise ConfigurationError(f"steps must be an integer of at least 1, not {steps!r}")
        if not all(0 <= value < float("inf") for value in (weight, lr, weight_decay)):
            raise ConfigurationError(
                f"weight, lr and weight_decay must not be negative, not {weight}, {lr} and {weight_decay}"
            )
        shape = {"num_tokens": num_tokens, "depth": depth, "init": init}
        shape, trained = (shape, None) if maple is None else _read_maple(maple, clip, shape)
        super().__init__(clip, tokenizer, class_names, **shape, allow_duplicates=allow_duplicates)
        self.options |= {"weight": weight, "steps": steps, "num_views": num_views, "selection": selection}
        self.options |= {"lr": lr, "weight_decay": weight_decay}
        self.weight, self.steps, self.num_views, self.selection = weight, steps, num_views, selection
        self.lr, self.weight_decay = lr, weight_decay
        self.options["depth"] = self.depth
        if trained is not None:
            super().load_trained_state(trained, f"the learner in {maple}")
        if statistics is not None:
            self._set_source(read_moments(statistics, self))

    def _set_source(self, moments: Moments) -> None:
        dtype = torch.float64 if self.text.dtype == torch.float64 else torch.float32
        for name, tensor in (("source_mean", moments.mean), ("source_variance", moments.variance)):
            self.register_buffer(name, tensor.to(self.text.device, dtype), persistent=False)

    def trained_state(self) -> dict[str, torch.Tensor]:
        """The prompts that every image starts from and, if there are any, the source statistics."""
        names = [name for name in ("source_mean", "source_variance") if hasattr(self, name)]
        return super().trained_state() | {name: getattr(self, name) for name in names}

    def load_trained_state(self, tensors: Mapping[str, torch.Tensor], what: str) -> None:
        """Take over saved tensors, with the source statistics.

        Raises:
            StorageError: they differ in name or shape; nothing is changed.
        """
        if {"source_mean", "source_variance"} <= tensors.keys():
            self._set_source(Moments(tensors["source_mean"].clone(), tensors["source_variance"].clone()))
        super().load_trained_state(tensors, what)

    def seen(self, images: torch.Tensor) -> torch.Tensor:
        """Views (batch, views, 3, height, width): those given, or drawn from images."""
        return views_of(self, images, self.num_views)

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Unit features (batch, views, features) of views or images with the prompts that every image starts from."""
        return features_of_views(self, images, self.num_views)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Refused: what is tuned changes the features.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            "PromptAlign tunes image prompts, too, and cannot classify features that were computed before; pass images"
        )

    def classify_seen(self, images: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of view 0 of views (batch, views, 3, height, width) with these features.

        Raises:
            ConfigurationError: there are no source statistics.
        """
        if self.weight and not hasattr(self, "source_mean"):
            raise ConfigurationError(f"PromptAlign needs the statistics of its source; {HOW}")
        with torch.inference_mode(False):
            images = images.clone() if images.is_inference() else images
            rows = [self._tuned(*own) for own in zip(images, features.detach().clone(), strict=True)]
            return torch.stack(rows) if rows else features.new_zeros(0, len(self.class_names))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of images (batch, 3, height, width) or views (batch, views, 3, height, width)."""
        views = self.seen(images)
        return self.classify_seen(views, self.image_features(views))

    def loss(
        self, images: torch.Tensor, labels: torch.Tensor, features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy and logits; nothing is trained by it."""
        logits = self(images)
        return F.cross_entropy(logits, labels), logits

    def _tuned(self, views: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Logits (classes,) of view 0 of one image, after tuning; the prompts are then as they were, to the bit."""
        tuned = list(self.clip.peft[self.adapter_name].parameters())
        before = [parameter.detach().clone() for parameter in tuned]
        optimizer = torch.optim.AdamW(tuned, lr=self.lr, weight_decay=self.weight_decay)
        start = None
        try:
            for step in range(self.steps):
                with torch.enable_grad():
                    texts = self.encode_text()
                    if step == 0:
                        order = by_confidence(self.logits(features, texts.detach())[None])[0]
                        chosen = views[order[: number_chosen(len(views), self.selection)]]
                    loss, start = self.objective(chosen, texts, start)
                    gradients = gradients_of(self.text, loss, tuned)
                for parameter, gradient in zip(tuned, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
            with torch.no_grad():
                return self.logits(unit(self.encode_images(views[:1])), self.encode_text())[0]
        finally:
            with torch.no_grad():
                for parameter, value in zip(tuned, before, strict=True):
                    parameter.copy_(value)
                    parameter.grad = None

    def objective(
        self, views: torch.Tensor, texts: torch.Tensor, start: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is made small for one image: entropy of the mean prediction, plus weight * D.

        Args:
            views: the chosen views (views, 3, height, width).
            texts: unit text features (classes, features).
            start: the prompts of the source (blocks, prompts, width), None for those that enter now.

        Returns:
            The value, and the prompts of the source, None if nothing is aligned.
        """
        with watched_blocks(self) as entered:
            features = unit(self.encode_images(views))
        entropy = marginal_entropy(self.logits(features, texts)[None])[0]
        if not self.weight:
            return entropy, None
        moments = moments_of(self, entered)
        # Those that are stored differ from them by rounding, and the sign of that would be a gradient.
        start = moments.mean[:, entered[0].shape[1] :].detach() if start is None else start
        mean = torch.cat((self.source_mean[:, : entered[0].shape[1]], start), dim=1)
        return entropy + self.weight * moments.distance(Moments(mean, self.source_variance)), start


def _read_maple(folder: str | Path, clip: nn.Module, given: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """Options and tensors of a saved `MaPLe`."""
    description, tensors = read_saved(folder)
    entry = description["learner"]
    if entry["class"] != "MaPLe":
        raise StorageError(f"PromptAlign can start from a MaPLe learner, and in {folder} is a {entry['class']}")
    check_same_clip(clip, description, f"the learner in {folder}")
    options = {name: entry["options"].get(name, value) for name, value in given.items()}
    blocks = {name.split(".visual.")[1].split(".")[0] for name in tensors if ".visual." in name}
    return options | {"depth": len(blocks)}, tensors
