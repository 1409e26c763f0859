"""Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification (2022), https://arxiv.org/abs/2207.09519."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn as nn

from visionpeft.clip.fitted_splits import check_splits
from visionpeft.clip.template_texts import TemplateTexts
from visionpeft.clip.templates import PHOTO
from visionpeft.clip.text import unit
from visionpeft.errors import ConfigurationError, StorageError

NUM_BETAS, NUM_ALPHAS = 200, 20
OF_IMAGENET = {"alpha": 1.17, "beta": 1.0, "max_alpha": 3.0, "max_beta": 7.0}


def grid(end: float, count: int) -> list[float]:
    """The authors' search values 0.1 + i (end - 0.1) / count, i < count: the end itself is not among them."""
    return [0.1 + i * (end - 0.1) / count for i in range(count)]


class TipAdapter(TemplateTexts):
    """Frozen zero-shot CLIP, plus the votes of labelled training images that resemble the image.

    logits = scale f t^T + alpha exp(-beta (1 - f F^T)) L, with unit image features f, unit text features t of a
    template, the cache of unit training features F (images, features), and their labels L (images, classes) as one-hot
    rows. `fit_features` fills the cache: F is the normalised mean of the features of `cache_views` augmentations of an
    image, which are not normalised before. Where a validation split is given, alpha and beta are those of a grid of 20
    times 200 values below `max_alpha` and `max_beta` that classify it best (the first of equals), else the values given
    here. Tip-Adapter trains nothing. Tip-Adapter-F (`train_keys`) trains F, so call `fit_features` before an optimiser
    is made; it chooses alpha and beta in `choose`, for the keys that are reported. Trainable: images * features.
    Source: Zhang et al., Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification, 2022. The authors
    search on a whole validation split, on ImageNet's test split, and report Tip-Adapter-F's best epoch on the test
    split.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        train_keys: train the cached features (Tip-Adapter-F).
        alpha: weight of the votes; None is what was published for the data set in a run, and ImageNet's 1.17 otherwise.
        beta: how fast a vote fades with the distance; None likewise, 1 for all of them.
        max_alpha: end of the grid of alpha, which starts at 0.1 and leaves the end out; None likewise, ImageNet's 3.
        max_beta: end of the grid of beta, which starts at 0.1 and leaves the end out; None likewise, ImageNet's 7.
        template: one template or several for the texts, with {} for the class name; None is the data set's own in a
            run, "tip_7" for ImageNet, and "a photo of a {}." otherwise.
        allow_duplicates: accept two classes of one name.
        cache_views: augmentations of each training image whose mean is cached in a run, unless the data shows a fixed
            number of views, which are cached then.

    Raises:
        ConfigurationError: a number out of range, or class names or templates that cannot be used.
    """

    class_bound = True
    fits_raw_features = True
    template_style = "tip_adapter"

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        train_keys: bool = False,
        alpha: float | None = None,
        beta: float | None = None,
        max_alpha: float | None = None,
        max_beta: float | None = None,
        template: str | list[str] | None = None,
        allow_duplicates: bool = False,
        cache_views: int = 10,
    ):
        given = {"alpha": alpha, "beta": beta, "max_alpha": max_alpha, "max_beta": max_beta}
        super().__init__(
            clip,
            tokenizer,
            class_names,
            options={"train_keys": train_keys, **given, "template": template, "cache_views": cache_views},
            templates=PHOTO if template is None else template,
            allow_duplicates=allow_duplicates,
        )
        values = OF_IMAGENET | {name: value for name, value in given.items() if value is not None}
        alpha, beta, max_alpha, max_beta = (values[name] for name in OF_IMAGENET)
        if alpha < 0 or beta < 0 or max_alpha < 0.1 or max_beta < 0.1:
            raise ConfigurationError(
                f"alpha and beta must not be negative and max_alpha and max_beta not below 0.1, not {alpha}, {beta}, "
                f"{max_alpha} and {max_beta}"
            )
        if cache_views < 1:
            raise ConfigurationError(f"cache_views must be at least 1, not {cache_views}")
        self.fitted_views = cache_views
        self.train_keys = self.by_gradient = train_keys
        self.max_alpha, self.max_beta = max_alpha, max_beta
        self.set_class_names(class_names)
        device, dtype = self.text.device, torch.float64 if self.text.dtype == torch.float64 else torch.float32
        self.register_buffer("alpha", torch.tensor(alpha, dtype=dtype, device=device))
        self.register_buffer("beta", torch.tensor(beta, dtype=dtype, device=device))
        self.register_buffer("labels", torch.empty(0, dtype=torch.long, device=device))
        self._set_keys(torch.empty(0, self.text.num_features, dtype=dtype, device=device))
        self._validation: tuple[torch.Tensor, torch.Tensor] | None = None

    def _set_keys(self, keys: torch.Tensor) -> None:
        if self.train_keys:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)

    def set_published(self, values: Mapping[str, Mapping[str, float | str]]) -> None:
        """Take over the alpha, beta and ends of the grid of the data set; a cache that is filled keeps its own."""
        if len(self.keys):
            return
        own = {name: v for name, v in values.get("tip_adapter", {}).items() if self.options[name] is None}
        for name, value in own.items():
            if name in ("alpha", "beta"):
                getattr(self, name).fill_(value)
            else:
                setattr(self, name, value)

    @torch.no_grad()
    def fit_features(
        self,
        train: tuple[torch.Tensor, torch.Tensor],
        validation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> dict:
        """Fill the cache, and choose alpha and beta on the validation split; Tip-Adapter-F does that after training.

        Args:
            train: image features (images, features), or (images, views, features) of several augmented views, as
                `encode_images` gives them; their mean over the views is normalised and cached. Labels (images,).
            validation: unit image features (images, features) and labels (images,).

        Returns:
            alpha, beta and, of what was chosen, the accuracy on the validation split.

        Raises:
            ConfigurationError: a split without images, or a label that no class has.
        """
        check_splits(self, train, validation)
        features, labels = (tensor.to(self.alpha.device) for tensor in train)
        features = features.to(self.alpha.dtype)
        features = features if features.ndim == 2 else features.mean(dim=1)
        # Inference tensors could not be trained.
        with torch.inference_mode(False), torch.no_grad():
            self._set_keys(unit(features).clone())
            self.labels = labels.long().clone()
        self._validation = validation
        return {} if self.train_keys or validation is None else self._choose()

    def choose(self) -> dict:
        """Choose alpha and beta of Tip-Adapter-F on the validation split."""
        return self._choose() if self.train_keys and self._validation is not None else {}

    @torch.no_grad()
    def _choose(self) -> dict:
        features, labels = (tensor.to(self.alpha.device) for tensor in self._validation)
        texts = self.text_features()
        zero_shot = self.logits(features.to(texts.dtype), texts)
        affinities = features.to(self.keys.dtype) @ self.keys.T
        best, alpha, beta = -1, None, None
        for b in grid(self.max_beta, NUM_BETAS):
            votes = self._votes(affinities, b)
            for a in grid(self.max_alpha, NUM_ALPHAS):
                correct = int(((zero_shot + a * votes).argmax(dim=1) == labels).sum())
                if correct > best:
                    best, alpha, beta = correct, a, b
        self.alpha.fill_(alpha)
        self.beta.fill_(beta)
        return {"alpha": alpha, "beta": beta, "validation_accuracy": best / len(labels)}

    def _votes(self, affinities: torch.Tensor, beta: float | torch.Tensor) -> torch.Tensor:
        """exp(-beta (1 - affinities)) L (batch, classes) of affinities (batch, images)."""
        votes = affinities.new_zeros(len(affinities), len(self.class_names))
        return votes.index_add(1, self.labels, (-beta * (1 - affinities)).exp())

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of unit image features (batch, features).

        Raises:
            ConfigurationError: the cache is empty.
        """
        if len(self.keys) == 0:
            raise ConfigurationError("Tip-Adapter has no training images yet; call fit_features first")
        # Under autocast a distance of 0.01 would be lost in the rounding.
        with torch.autocast(features.device.type, enabled=False):
            votes = self._votes(features.to(self.keys.dtype) @ self.keys.T, self.beta)
        texts = self.text_features()  # in float32, also where the cache was cast to less
        return self.logits(features.to(texts.dtype), texts) + self.alpha * votes

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Cache, alpha and beta, by name."""
        return {"keys": self.keys, "labels": self.labels, "alpha": self.alpha, "beta": self.beta}

    @torch.no_grad()
    def load_trained_state(self, tensors: Mapping[str, torch.Tensor], what: str) -> None:
        """Take over a saved cache of any number of images.

        Raises:
            StorageError: the tensors do not fit each other or this learner; nothing is changed.
        """
        keys, labels = tensors.get("keys"), tensors.get("labels")
        if keys is None or labels is None or len(keys) != len(labels) or labels.dtype != torch.long:
            raise StorageError(f"the tensors of {what} do not fit: it needs as many labels as cached features")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.class_names):
            raise StorageError(f"the tensors of {what} have labels that none of its classes has")
        old = self.keys, self.labels
        self._set_keys(self.keys.new_empty(len(keys), self.keys.shape[1]))
        self.labels = labels.to(self.labels.device)
        try:
            super().load_trained_state(tensors, what)
        except StorageError:
            self._set_keys(old[0].detach())
            self.labels = old[1]
            raise
