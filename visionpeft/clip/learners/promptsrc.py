"""PromptSRC: Self-regulating Prompts (Khattak et al., 2023), https://arxiv.org/abs/2307.06948."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.clip.learners.independent_prompts import IndependentPrompts
from visionpeft.clip.templates import PHOTO
from visionpeft.clip.text import unit
from visionpeft.clip.unprompted import frozen_image_features, unprompted
from visionpeft.errors import ConfigurationError


class PromptSRC(IndependentPrompts):
    """Prompts as in `IVLP`, held near the CLIP they start from, and averaged over the epochs.

    loss = cross entropy + text_weight * mean |t - t0| + image_weight * mean |f - f0| + logit_weight * KL(p0 || p),
    with unit features f, t and class probabilities p; f0, t0, p0 are those of the CLIP without prompts, f0 of the same
    images. t0 is the normalised mean over templates of features that are not normalised. KL is the sum over classes,
    divided by the number of classes, in the mean over images.
    After training the prompts are their mean over the epochs a = 1 .. N, weighted with exp(-(a - mean)^2 / (2 std^2)).
    Trainable, with text width d and image width D: depth * num_text * d + depth * num_visual * D; 46,080 on ViT-B/16.
    Source: Khattak et al., Self-regulating Prompts: Foundational Model Adaptation without Forgetting, 2023. Runs
    of 20 epochs have mean and std 15, 1 from base to new classes, and 6, 10 with depth 3 across data sets; few-shot
    runs of 50 epochs have 30, 30 or 45, 5, by data set.

    Args:
        clip: an OpenCLIP model; a tower that gets prompts must be a transformer. It gets an adapter named "promptsrc".
        tokenizer: its tokenizer.
        class_names: names of the classes.
        num_text: text prompts per block.
        num_visual: image prompts per block.
        depth_text: number of text blocks with their own prompts; None for 9, or all blocks of a shallower tower.
        depth_visual: the same for the image tower.
        init: words before the class name, of which the first `num_text` are learned. If they are fewer, or None,
            v starts at random and no fixed words follow.
        template: one template or several for t0, with {} for the class name, or the name of a set; by default the
            authors' 60, the first of OpenAI's 80. None is the data set's own in a run, "a photo of a {}." otherwise.
        text_weight: weight of the distance of text features.
        image_weight: weight of the distance of image features.
        logit_weight: weight of the divergence of class probabilities.
        average_mean: the epoch, counted from 1, that weighs most in the mean of the prompts; None keeps the last ones.
        average_std: how many epochs weigh.
        allow_duplicates: accept two classes of one name.

    Raises:
        UnsupportedError: a tower that would get prompts is no transformer with sited blocks, such as a ResNet.
        ConfigurationError: no prompts at all, more depth than blocks, a prompt longer than the text tower, an adapter
            of that name, a negative weight, or an `average_std` that is not positive.
    """

    features_suffice = True

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        num_text: int = 4,
        num_visual: int = 4,
        depth_text: int | None = None,
        depth_visual: int | None = None,
        init: str | None = "a photo of a",
        template: str | list[str] | None = "promptsrc_60",
        text_weight: float = 25.0,
        image_weight: float = 10.0,
        logit_weight: float = 1.0,
        average_mean: float | None = 15.0,
        average_std: float = 1.0,
        allow_duplicates: bool = False,
    ):
        own = {"num_text": num_text, "num_visual": num_visual, "depth_text": depth_text, "depth_visual": depth_visual}
        own["init"] = init
        options = own | {"template": template, "text_weight": text_weight, "image_weight": image_weight}
        options |= {"logit_weight": logit_weight, "average_mean": average_mean, "average_std": average_std}
        if min(text_weight, image_weight, logit_weight) < 0:
            raise ConfigurationError(
                f"text_weight, image_weight and logit_weight must not be negative, not {text_weight}, {image_weight} "
                f"and {logit_weight}"
            )
        if not average_std > 0:
            raise ConfigurationError(f"average_std must be positive, not {average_std}")
        super().__init__(
            clip,
            tokenizer,
            class_names,
            **own,
            default_depth=9,
            options=options,
            templates=template or PHOTO,
            allow_duplicates=allow_duplicates,
        )
        self.text_weight, self.image_weight, self.logit_weight = text_weight, image_weight, logit_weight
        self.average_mean, self.average_std = average_mean, average_std
        # Buffers, so that a run that goes on from a checkpoint goes on averaging.
        total = sum(parameter.numel() for parameter in self.trainable_parameters())
        reference = self.trainable_parameters()[0]
        self.register_buffer("average", torch.zeros(total, dtype=reference.dtype, device=reference.device))
        self.register_buffer("average_weight", torch.zeros((), dtype=reference.dtype, device=reference.device))

    def template_features(self) -> torch.Tensor:
        """Text features t0 (classes, features) of the CLIP without prompts."""

        def compute() -> torch.Tensor:
            with unprompted(self):
                features = [self.encode(layout)[0] for layout in self.frozen_layouts]
            return unit(torch.stack(features).mean(dim=0))

        others = [name for name in self.acting if name != self.adapter_name]
        return self.kept("templates", compute, adapters=others)

    def frozen_image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Image features f0 (batch, features) of the CLIP without prompts."""
        return frozen_image_features(self, images)

    def loss(
        self, images: torch.Tensor | None, labels: torch.Tensor, features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Training loss and logits (batch, classes) of images (batch, 3, height, width) and labels (batch,)."""
        frozen_text = self.template_features()
        frozen = features if features is not None and self.frozen_images else self.frozen_image_features(images)
        text = self.text_features()
        images_now = frozen if self.frozen_images else self.image_features(images)
        logits = self.logits(images_now, text)
        log_p, log_p0 = (x.log_softmax(dim=-1) for x in (logits, self.logits(frozen, frozen_text)))
        divergence = F.kl_div(log_p, log_p0, reduction="sum", log_target=True) / logits.numel()
        loss = F.cross_entropy(logits, labels) + self.logit_weight * divergence
        loss = loss + self.text_weight * (text - frozen_text).abs().mean()
        return loss + self.image_weight * (images_now - frozen).abs().mean(), logits

    @torch.no_grad()
    def end_epoch(self, epoch: int, num_epochs: int) -> None:
        """Take the prompts of this epoch into their mean, which begins anew with every training."""
        if self.average_mean is None:
            return
        if epoch == 0:
            self.average.zero_()
            self.average_weight.zero_()
        epochs = torch.arange(1, num_epochs + 1, dtype=torch.float64)
        weights = (-((epochs - self.average_mean) ** 2) / (2 * self.average_std**2)).softmax(dim=0)
        weight = weights[epoch].to(self.average)
        self.average_weight += weight
        if self.average_weight > 0:
            now = torch.cat([parameter.flatten() for parameter in self.trainable_parameters()])
            self.average.lerp_(now, weight / self.average_weight)

    @torch.no_grad()
    def end_training(self) -> dict:
        """Put the mean over the epochs in the place of the last prompts."""
        if self.average_weight > 0:
            parameters = self.trainable_parameters()
            parts = self.average.split([parameter.numel() for parameter in parameters])
            for parameter, mean in zip(parameters, parts, strict=True):
                parameter.copy_(mean.view_as(parameter))
        return {}

    @property
    def averages(self) -> str | None:
        """PromptSRC ends with a mean of its own."""
        if self.average_mean is None:
            return None
        return "ends with the mean of its prompts over the epochs; set average_mean to null"
