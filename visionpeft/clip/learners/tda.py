"""TDA: Efficient Test-Time Adaptation of Vision-Language Models (Karmanov et al., 2024), arXiv 2403.18293."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn as nn

from visionpeft.clip.model import check_prepared
from visionpeft.clip.template_texts import TemplateTexts
from visionpeft.clip.templates import PHOTO
from visionpeft.clip.views import by_confidence, check_selection, features_of_views, marginal_entropy, number_chosen
from visionpeft.errors import ConfigurationError

OF_IMAGENET = {"alpha": 2.0, "beta": 5.0}


class TDA(TemplateTexts):
    """Zero-shot CLIP, plus the votes of earlier test images that it was sure of, less those of some it was not.

    With unit image feature f, zero-shot logits l, p = softmax(l), the class y of the largest logit and entropy H of p,

        logits = l + alpha sum_i exp(-beta (1 - f k_i)) onehot(y_i)
                   - negative_alpha sum_j exp(-negative_beta (1 - f k_j)) 1[low < p_j < high].

    The cache of keys k_i has `capacity` places for each class y, the cache of keys k_j `negative_capacity`. An image
    takes a free place of its class, or that of the entry of the highest H if its own is lower; a place in the second
    cache only if H / log2(classes) lies within `entropy_window`. (H is in nats, as published, so that this quotient
    ends at ln 2 = 0.693 and not at 1.) An image enters before it is scored, so it votes for itself. Nothing is trained.

    What it predicts depends on the images before: a batch is taken in the order of its rows, one after the other, every
    call continues the stream, `num_seen` counts its images, and `reset` forgets them; so do new class names and other
    templates. The caches are not saved.

    Of several views (batch, views, 3, height, width) the share `selection` of lowest entropy is chosen: f is the mean
    of their unit features (not normalised again), l that of their logits, p that of their probabilities.
    Source: Karmanov et al., Efficient Test-Time Adaptation of Vision-Language Models, 2024. Their alpha and beta differ
    from data set to data set, evidently chosen on the test splits; the default is ImageNet's pair for all.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        alpha: weight of the votes; None is 2, ImageNet's, or the data set's with `published`.
        beta: how fast a vote fades with the distance; None is 5, or the data set's with `published`.
        capacity: entries of a class that vote for it.
        negative_alpha: weight of the votes against classes.
        negative_beta: how fast they fade.
        negative_capacity: entries of a class that vote against others.
        entropy_window: between which H / log2(classes) an image votes against classes.
        probability_window: low and high, between which its probability of a class is one to vote against.
        selection: share of the views that is chosen; at least one is.
        published: in a run take what the authors chose for the data set where alpha or beta is not given.
        template: one template or several for the texts, with {} for the class name; None is what the authors take for
            the data set in a run, often "tip_7", and "a photo of a {}." otherwise.
        allow_duplicates: accept two classes of one name.

    Raises:
        ConfigurationError: a number out of range, or class names or templates that cannot be used.
    """

    by_gradient = False
    adapts_while_testing = True
    online = True
    template_style = "tda"

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        alpha: float | None = None,
        beta: float | None = None,
        capacity: int = 3,
        negative_alpha: float = 0.117,
        negative_beta: float = 1.0,
        negative_capacity: int = 2,
        entropy_window: tuple[float, float] = (0.2, 0.5),
        probability_window: tuple[float, float] = (0.03, 1.0),
        selection: float = 0.1,
        published: bool = False,
        template: str | list[str] | None = None,
        allow_duplicates: bool = False,
    ):
        options = {"alpha": alpha, "beta": beta, "capacity": capacity, "negative_alpha": negative_alpha}
        options |= {"negative_beta": negative_beta, "negative_capacity": negative_capacity}
        options |= {"entropy_window": list(entropy_window), "probability_window": list(probability_window)}
        options |= {"selection": selection, "published": published, "template": template}
        weights = [value for value in (alpha, beta, negative_alpha, negative_beta) if value is not None]
        if not all(0 <= value < math.inf for value in weights):
            raise ConfigurationError(
                f"alpha, beta, negative_alpha and negative_beta must be numbers that are not negative, not {alpha}, "
                f"{beta}, {negative_alpha} and {negative_beta}"
            )
        if not all(isinstance(count, int) and count >= 1 for count in (capacity, negative_capacity)):
            raise ConfigurationError(
                f"capacity and negative_capacity must be integers of at least 1, not {capacity} and "
                f"{negative_capacity}; a weight of 0 turns votes off"
            )
        for name, window in (("entropy_window", entropy_window), ("probability_window", probability_window)):
            if len(window) != 2 or not window[0] < window[1]:
                raise ConfigurationError(f"{name} must be two numbers, the lower one first, not {list(window)}")
        check_selection(selection)
        super().__init__(
            clip,
            tokenizer,
            class_names,
            options=options,
            templates=PHOTO if template is None else template,
            allow_duplicates=allow_duplicates,
        )
        values = OF_IMAGENET | {name: value for name in OF_IMAGENET if (value := options[name]) is not None}
        dtype = torch.float64 if self.text.dtype == torch.float64 else torch.float32
        for name, value in values.items():  # saved, because a run may take those of its data set
            self.register_buffer(name, torch.tensor(value, dtype=dtype, device=self.text.device))
        self.capacity, self.negative_capacity = capacity, negative_capacity
        self.negative_alpha, self.negative_beta = negative_alpha, negative_beta
        self.entropy_window, self.probability_window = tuple(entropy_window), tuple(probability_window)
        self.selection, self.published = selection, published
        self.num_seen = 0
        self.set_class_names(class_names)

    def set_class_names(self, class_names: Sequence[str]) -> None:
        """Classify into other classes, with empty caches; nothing is changed if the names are refused.

        Raises:
            ConfigurationError: names that cannot be used.
        """
        super().set_class_names(class_names)
        self.reset()

    def set_template(self, template: str | Sequence[str]) -> None:
        """Use the template of a data set where none was given, with empty caches: their classes are by the old texts.

        Raises:
            ConfigurationError: a template without {}, or one that makes a text too long; nothing is changed.
        """
        before = self.templates
        super().set_template(template)
        if self.templates != before:
            self.reset()

    def set_published(self, values: Mapping[str, Mapping[str, float | str]]) -> None:
        """Take over alpha and beta of the data set, with the option `published`."""
        if self.published:
            for name, otherwise in OF_IMAGENET.items():
                if self.options[name] is None:
                    getattr(self, name).fill_(values.get("tda", {}).get(name, otherwise))

    def reset(self) -> None:
        """Forget the images of the stream."""
        # A test begins in inference mode, whose tensors could not be written to later.
        with torch.inference_mode(False):
            classes, width = len(self.class_names), self.text.num_features
            device, dtype = self.text.device, torch.float64 if self.text.dtype == torch.float64 else torch.float32
            for name, places in (("positive", self.capacity), ("negative", self.negative_capacity)):
                keys = torch.zeros(classes, places, width, dtype=dtype, device=device)
                # A free place has an entropy that every image's is below.
                entropies = torch.full((classes, places), math.inf, dtype=dtype, device=device)
                self.register_buffer(f"{name}_keys", keys, persistent=False)
                self.register_buffer(f"{name}_entropies", entropies, persistent=False)
            against = torch.zeros(
                classes, self.negative_capacity, classes, dtype=dtype, device=device
            )  # zeros and ones
            self.register_buffer("against", against, persistent=False)
        self.num_seen = 0

    def trained_state(self) -> dict[str, torch.Tensor]:
        """alpha and beta, by name; the caches are not saved."""
        return {"alpha": self.alpha, "beta": self.beta}

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Unit features (batch, features) of images, or (batch, views, features) of views."""
        check_prepared(images)
        return features_of_views(self, images, 1) if images.ndim == 5 else super().image_features(images)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of unit features (batch, features), or (batch, views, features) of several views.

        The images enter the stream in the order of the batch.
        """
        with torch.inference_mode(False), torch.no_grad():
            texts, dtype = self.text_features(), self.positive_keys.dtype
            features = features.detach().to(texts.dtype, copy=True)
            if features.ndim == 2:
                features = features[:, None]
            logits, features = self.logits(features, texts).to(dtype), features.to(dtype)
            count = number_chosen(features.shape[1], self.selection)
            if features.shape[1] > 1:
                chosen = by_confidence(logits)[:, :count, None]
                features, logits = features.take_along_dim(chosen, 1), logits.take_along_dim(chosen, 1)
            entropies, probabilities = marginal_entropy(logits), logits.softmax(dim=-1).mean(dim=1)
            features, logits = features.mean(dim=1), logits.mean(dim=1)
            with torch.autocast(features.device.type, enabled=False):
                rows = [self._next(*image) for image in zip(features, logits, probabilities, entropies, strict=True)]
            self.num_seen += len(rows)
            return torch.stack(rows) if rows else logits

    def _next(self, feature, logits, probabilities, entropy) -> torch.Tensor:
        """Logits (classes,) of the next image of the stream, after it has entered the caches.

        Everything stays on the device: what enters is decided by `where`, not by asking for a value.
        """
        label = logits.argmax(dim=-1, keepdim=True)
        self._enter("positive", label, feature, entropy)
        low, high = self.entropy_window
        unsure = entropy / math.log2(max(2, len(self.class_names)))
        # Outside the window it is as if its entropy were too high for any place.
        within = (unsure > low) & (unsure < high)
        entropy = torch.where(within, entropy, torch.full_like(entropy, math.inf))
        place, enters = self._enter("negative", label, feature, entropy)
        low, high = self.probability_window
        mask = ((probabilities > low) & (probabilities < high)).to(self.against.dtype)
        self.against[label, place] = torch.where(enters, mask, self.against[label, place])
        votes = self._affinities("positive", feature, self.beta).sum(dim=1)
        against = self._affinities("negative", feature, self.negative_beta).flatten() @ self.against.flatten(0, 1)
        return logits + self.alpha * votes - self.negative_alpha * against

    def _enter(self, cache: str, label: torch.Tensor, feature: torch.Tensor, entropy: torch.Tensor):
        """Put the image into the cache if it belongs there: the place (1,), and whether (1,) it is there now."""
        keys, entropies = getattr(self, f"{cache}_keys"), getattr(self, f"{cache}_entropies")
        highest, place = entropies[label].max(dim=-1)
        enters = entropy < highest
        keys[label, place] = torch.where(enters, feature, keys[label, place])
        entropies[label, place] = torch.where(enters, entropy, highest)
        return place, enters

    def _affinities(self, cache: str, feature: torch.Tensor, beta: torch.Tensor | float) -> torch.Tensor:
        """exp(-beta (1 - f k)) (classes, places) of the keys, 0 at free places."""
        keys, entropies = getattr(self, f"{cache}_keys"), getattr(self, f"{cache}_entropies")
        return torch.where(entropies.isinf(), 0.0, (-beta * (1 - keys @ feature)).exp())
