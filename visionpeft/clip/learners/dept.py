"""DePT: Decoupled Prompt Tuning (Zhang et al., 2024), https://arxiv.org/abs/2309.07439."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.clip.layout import Tokens, places_among
from visionpeft.clip.learner import Learner
from visionpeft.clip.learners.cocoop import CoCoOp
from visionpeft.clip.learners.coop import CoOp
from visionpeft.clip.learners.kgcoop import KgCoOp
from visionpeft.clip.learners.maple import MaPLe
from visionpeft.clip.text import unit
from visionpeft.errors import ConfigurationError

HOSTS = {host.__name__: host for host in (CoOp, CoCoOp, KgCoOp, MaPLe)}


class DePT(Learner):
    """A prompt learner with a second head, which learns what is about the trained classes alone.

    With image features f and text features t_k of the host that are not normalised, the second head has logits

        h(f) = V (a_v f + b_v) + c,   h(t) = V (a_t t + b_t) + c,

    with vectors a, b (features,) and V (classes, features). Loss = (1 - weight) * the host's cross-entropy + weight *
    the mean cross-entropy of h(f) and of h(t_y) over the images of a batch, with the text feature of each image's
    label; what holds the texts of KgCoOp is added whole, as in the authors' code, where its weight is 2 instead of 8.
    Trained classes, all of them or some, in any order, are told by (1 - weight) * logits of the host + weight * h(f);
    where one of the names was not trained, all are told by the host alone. With weight 0 it is the host. a = 1 and
    b = 0 at the start; V and c start as `nn.Linear` does.
    Trainable: that of the host + 4 e + classes (e + 1), with e features; 53,348 for 100 classes on ViT-B/16.
    Source: Zhang et al., DePT: Decoupled Prompt Tuning, 2024. Not the decomposed prompt tuning of the same name. As
    published, logits of two scales are mixed: V sees the length of f, of about 10 for OpenAI's CLIP.

    Args:
        clip: an OpenCLIP model that the host takes.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        host: the prompt learner: "CoOp", "CoCoOp", "KgCoOp" or "MaPLe".
        host_options: its further arguments, such as {"num_tokens": 4}.
        weight: share of the second head, from 0 to less than 1.
        trained_names: the classes of the second head; None for `class_names`.
        allow_duplicates: accept two classes of one name.

    Raises:
        ConfigurationError: an unknown host, arguments it does not have, or a weight out of range; and what the host
            refuses.
        UnsupportedError: what the host refuses.
    """

    features_suffice = True

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        host: str = "CoOp",
        host_options: dict | None = None,
        weight: float = 0.7,
        trained_names: list[str] | None = None,
        allow_duplicates: bool = False,
    ):
        if host not in HOSTS:
            raise ConfigurationError(f"host must be one of {', '.join(HOSTS)}, not {host!r}")
        if not 0 <= weight < 1:
            raise ConfigurationError(f"weight must be a share from 0 to less than 1, not {weight}")
        options = {"host": host, "host_options": host_options, "weight": weight}
        super().__init__(clip, tokenizer, class_names, options=options, allow_duplicates=allow_duplicates)
        names = class_names if trained_names is None else trained_names
        try:
            self.host = HOSTS[host](clip, tokenizer, names, **(host_options or {}), allow_duplicates=allow_duplicates)
        except TypeError as error:
            raise ConfigurationError(f"host_options do not fit {host}: {error}") from None
        self.weight = weight
        self.acting, self.adapter_name, self.adapted = self.host.acting, self.host.adapter_name, self.host.adapted
        self.frozen_images, self.class_bound = self.host.frozen_images, self.host.class_bound
        self.templates, self.template_style = self.host.templates, self.host.template_style
        self.trained_names = self.host.class_names
        self.options["trained_names"] = self.trained_names
        dtype = torch.float64 if self.text.dtype == torch.float64 else torch.float32
        self.on_images, self.on_texts = (Affine(self.text.num_features) for _ in range(2))
        self.head = nn.Linear(self.text.num_features, len(self.trained_names))
        for module in (self.on_images, self.on_texts, self.head):
            module.to(self.text.device, dtype)
        self.set_class_names(class_names)

    def prompts(self, names: Sequence[str]) -> list[Tokens]:
        """Those of the host."""
        return self.host.prompts(names)

    def set_class_names(self, class_names: Sequence[str]) -> None:
        """Classify into other classes; the second head tells trained ones, where all are.

        Raises:
            ConfigurationError: names that cannot be used, or the host has learnt something for each of its classes.
        """
        self.host.set_class_names(class_names)
        self.class_names, self.layout = self.host.class_names, self.host.layout
        self.places = places_among(self.class_names, self.trained_names)
        self.frozen_layouts = self.host.frozen_layouts

    def set_template(self, template: str | Sequence[str]) -> None:
        """Let the host use the template of a data set where it was given none.

        Raises:
            ConfigurationError: a template without {}, or one that makes a text too long; nothing is changed.
        """
        self.host.set_template(template)
        self.templates, self.frozen_layouts = self.host.templates, self.host.frozen_layouts

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Image features (batch, features), at least in float32, of the length that the tower gives them.

        Raises:
            ConfigurationError: as `encode_images`.
        """
        features = self.encode_images(images)
        return features if features.dtype == torch.float64 else features.float()

    def text_features(self, *image_features: torch.Tensor) -> torch.Tensor:
        """Unit text features of the host, (classes, features) or, of CoCoOp, (batch, classes, features)."""
        return self._prepared_host().text_features(*image_features)

    def second_head(self, features: torch.Tensor, of: "Affine") -> torch.Tensor:
        """Logits (batch, classes) of features (batch, features) that are not normalised."""
        # Under autocast the logits would be rounded before they are mixed.
        with torch.autocast(features.device.type, enabled=False):
            return self.head(of(features.to(self.head.weight.dtype)))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of image features (batch, features) that are not normalised."""
        return self._mixed(self._prepared_host().classify(unit(features)), features)

    def _mixed(self, logits: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        if None in self.places:
            return logits
        own = self.second_head(features, self.on_images)
        if not self._in_order():
            own = own[:, self.places]
        return (1 - self.weight) * logits + self.weight * own

    def _in_order(self) -> bool:
        """Whether the classes are the trained ones, in their order."""
        return self.places == list(range(len(self.trained_names)))

    def _prepared_host(self) -> Learner:
        """The host, which encodes texts as this learner is told to."""
        self.host.chunk_size, self.host.fast_text = self.chunk_size, self.fast_text
        return self.host

    def loss(
        self, images: torch.Tensor | None, labels: torch.Tensor, features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Training loss and logits (batch, classes), for the trained class names.

        Args:
            images: (batch, 3, height, width); may be None if `features` are given.
            labels: (batch,).
            features: image features (batch, features) that are not normalised, if they have been kept.

        Raises:
            ConfigurationError: it has other class names now than the second head.
        """
        if not self._in_order():
            raise ConfigurationError(
                "the second head of DePT learns its own classes alone; give it their names back (set_class_names)"
            )
        features = self.image_features(images) if features is None else features
        host, directions = self._prepared_host(), unit(features)
        context = host.context(directions) if isinstance(host, CoCoOp) else host.context()
        texts = host.encode(host.layout, context)  # (1 or batch, classes, features), read by both heads
        similar = host.logits(directions[:, None], unit(texts))[:, 0]
        own = texts.expand(len(labels), -1, -1)[torch.arange(len(labels), device=texts.device), labels]
        both = torch.cat((self.second_head(features, self.on_images), self.second_head(own, self.on_texts)))
        second = F.cross_entropy(both, labels.repeat(2))
        loss = (1 - self.weight) * F.cross_entropy(similar, labels) + self.weight * second
        return loss + host.text_penalty(unit(texts)[0]), self._mixed(similar, features)

    def head_parameters(self) -> list[nn.Parameter]:
        """Those of the second head, which the authors train at 6.5 times the rate of the prompts."""
        return [*self.on_images.parameters(), *self.on_texts.parameters(), *self.head.parameters()]


class Affine(nn.Module):
    """a x + b, value by value; a = 1 and b = 0 at the start."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., width) to the same shape."""
        return self.scale * x + self.shift
