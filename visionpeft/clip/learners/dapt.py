"""DAPT: Distribution-Aware Prompt Tuning for Vision-Language Models (Cho et al., 2023), arXiv 2309.03406."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from visionpeft.clip.layout import Tokens
from visionpeft.clip.learner import Learner
from visionpeft.clip.learners.coop import context_prompts, initial_context
from visionpeft.errors import ConfigurationError
from visionpeft.methods.vpt import VPT


class DAPT(Learner):
    """A context for the texts and prompts for the images, which draw each class together and the classes apart.

    The context is that of `CoOp`, the image prompts those of a shallow `VPT`. With unit features f, t and prototypes
    c_k, the mean of the unit features that the frozen CLIP has of class k's training images (`fit_features`),

        loss = cross-entropy + image_weight * mean_i mean_j (f_ij - c_yj)^2
                             + text_weight * mean_{k < l} exp(-2 |t_k - t_l|^2),

    over images i of label y, features j and classes k, l. Prototypes are not brought to length 1. v ~ N(0, 0.02^2).
    Trainable, with text width d and image width D: context_length * d + num_visual * D; 20,480 on ViT-B/16.
    Source: Cho et al., Distribution-Aware Prompt Tuning for Vision-Language Models, 2023. The authors have another rate
    (0.002 to 20) and other weights (image 0.01 to 100, text 0.01 to 10) for each data set, and no rule for them: search
    on a validation split. The distance is a mean over features, so that its weights are large.

    Args:
        clip: an OpenCLIP model whose image tower is a transformer. It gets an adapter named "dapt".
        tokenizer: its tokenizer.
        class_names: names of the classes.
        context_length: number of context vectors; by default 16, or the number of tokens of `init`.
        init: a phrase to start from, such as "a photo of a"; None starts at random.
        num_visual: image prompts.
        image_weight: weight of the distance to the prototypes; above 0, call `fit_features` before training.
        text_weight: weight of the term that keeps the texts of different classes apart.
        allow_duplicates: accept two classes of one name.

    Raises:
        UnsupportedError: the image tower is no transformer with sited blocks, such as a ResNet.
        ConfigurationError: a number out of range, a context longer than `init`, a prompt longer than the text tower, or
            an adapter of that name.
    """

    frozen_images = False
    adapter_name = "dapt"
    compares_pairs = True

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        context_length: int | None = None,
        init: str | None = None,
        num_visual: int = 16,
        image_weight: float = 1.0,
        text_weight: float = 1.0,
        allow_duplicates: bool = False,
    ):
        if not (0 <= image_weight < math.inf and 0 <= text_weight < math.inf):
            raise ConfigurationError(
                f"image_weight and text_weight must be finite numbers that are not negative, not {image_weight} and "
                f"{text_weight}"
            )
        options = {"context_length": context_length, "init": init, "num_visual": num_visual}
        options |= {"image_weight": image_weight, "text_weight": text_weight}
        super().__init__(clip, tokenizer, class_names, options=options, allow_duplicates=allow_duplicates)
        self.image_weight, self.text_weight = image_weight, text_weight
        vectors = initial_context(self, context_length, init, default=16)
        self.context_length = len(vectors)
        self.set_class_names(class_names)
        self.vectors = nn.Parameter(vectors.clone())
        self.fitted_names: list[str] = []
        prototypes = torch.zeros(len(self.class_names), self.text.num_features).to(vectors)
        self.register_buffer("prototypes", prototypes, persistent=False)  # a run that goes on computes them again
        self.adapt(VPT(num_visual, deep=False))

    def prompts(self, names: Sequence[str]) -> list[Tokens]:
        """[v_1 .. v_M, name, "."]."""
        return context_prompts(self.tokenizer, names, self.context_length)

    def context(self) -> torch.Tensor:
        """Context vectors (1, vectors, width)."""
        return self.vectors[None]

    def fit_features(
        self,
        train: tuple[torch.Tensor, torch.Tensor],
        validation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> dict:
        """Compute the prototypes.

        Args:
            train: unit image features (images, features) of the frozen CLIP, or (images, views, features) of several
                augmented views; labels (images,).
            validation: not used.

        Raises:
            ConfigurationError: a class without training images, or a label that no class has.
        """
        if not self.image_weight:
            return {}
        features, labels = (tensor.to(self.prototypes.device) for tensor in train)
        classes = len(self.class_names)
        if sorted(set(labels.tolist())) != list(range(classes)):
            raise ConfigurationError(f"DAPT needs training images of all its {classes} classes, and of no others")
        with torch.inference_mode(False), torch.no_grad():
            rows = features.clone() if features.ndim == 2 else features.mean(dim=1)
            sums = (
                torch.zeros(classes, rows.shape[1]).to(self.prototypes).index_add(0, labels, rows.to(self.prototypes))
            )
            self.prototypes = sums / torch.bincount(labels, minlength=classes)[:, None]
        self.fitted_names = self.class_names
        return {}

    def loss(
        self, images: torch.Tensor | None, labels: torch.Tensor, features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Training loss and logits (batch, classes) of images (batch, 3, height, width) and labels (batch,).

        Raises:
            ConfigurationError: there are no prototypes of these classes.
        """
        if self.image_weight and self.fitted_names != self.class_names:
            raise ConfigurationError(
                "DAPT holds images near the prototypes of their classes; call fit_features with the features of the "
                "training images first"
            )
        now, texts = self.image_features(images), self.text_features()
        logits = self.logits(now, texts)
        loss = self.class_loss(logits, labels)
        if self.image_weight:
            loss = loss + self.image_weight * (now - self.prototypes[labels].to(now.dtype)).square().mean()
        return loss + self.text_weight * self.likeness(texts), logits

    def likeness(self, texts: torch.Tensor) -> torch.Tensor | float:
        """Mean of exp(-2 |t_k - t_l|^2) over pairs of different classes, from exp(-8) to 1; 0 for a single class."""
        if len(texts) == 1:
            return 0.0
        with torch.autocast(texts.device.type, enabled=False):
            near = (-4 * (1 - texts @ texts.mT)).exp()  # |t - u|^2 = 2 - 2 t u
            return (near.sum() - near.diagonal().sum()) / (len(texts) * (len(texts) - 1))
