"""ProVP-Ref: Progressive Visual Prompt Learning with Contrastive Feature Re-formation (Xu et al., 2023).

https://arxiv.org/abs/2304.08386
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.clip.template_texts import TemplateTexts
from visionpeft.clip.templates import PHOTO
from visionpeft.clip.unprompted import frozen_image_features
from visionpeft.errors import ConfigurationError
from visionpeft.methods.parts.progressive_prompts import ProgressivePrompts


class ProVP(TemplateTexts):
    """Image prompts that go from block to block, each of which mixes in its own, held near the images of frozen CLIP.

    See `ProgressivePrompts` for the prompts. The texts are frozen. With unit image features f and those of the CLIP
    without prompts, f0, of a batch of images i,

        loss = cross-entropy + weight * mean_i -log softmax_j(f_i f0_j / temperature) at j = i.

    With several processes, each compares the images of its own batch.
    Trainable on L image blocks of width D: L * num_tokens * D; 147,456 on ViT-B/16 for 16 prompts.
    Source: Xu et al., Progressive Visual Prompt Learning with Contrastive Feature Re-formation, 2023. In the authors'
    code, four prompts or fewer never enter and overwrite patches from block 1 on; the weight of the second term is
    always 1; its cosines have no temperature (1 here), so that it is nearly flat; and prompts start as those of a ViT
    with patches of 14 pixels, within 0.067 instead of 0.0625.

    Args:
        clip: an OpenCLIP model whose image tower is a transformer. It gets an adapter named "provp".
        tokenizer: its tokenizer.
        class_names: names of the classes.
        num_tokens: prompts per block.
        carry: share of what came out of the block before.
        weight: weight of the second term; 0 leaves it out.
        temperature: of the second term; None for that of the CLIP.
        template: one template or several for the texts, with {} for the class name; None is the data set's own in a
            run, the one with the name last that ProGrad has, and "a photo of a {}." otherwise.
        allow_duplicates: accept two classes of one name.

    Raises:
        UnsupportedError: the image tower is no transformer with sited blocks, such as a ResNet.
        ConfigurationError: a number out of range, or an adapter of that name.
    """

    frozen_images = False
    adapter_name = "provp"
    compares_pairs = True
    template_style = "prograd"

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        num_tokens: int = 16,
        carry: float = 0.01,
        weight: float = 1.0,
        temperature: float | None = None,
        template: str | list[str] | None = None,
        allow_duplicates: bool = False,
    ):
        if not 0 <= weight < math.inf:
            raise ConfigurationError(f"weight must be a finite number that is not negative, but is {weight}")
        if temperature is not None and not 0 < temperature < math.inf:
            raise ConfigurationError(f"temperature must be positive, or None for that of the CLIP, not {temperature}")
        options = {"num_tokens": num_tokens, "carry": carry, "weight": weight, "temperature": temperature}
        super().__init__(
            clip,
            tokenizer,
            class_names,
            options=options | {"template": template},
            templates=PHOTO if template is None else template,
            allow_duplicates=allow_duplicates,
        )
        self.weight, self.temperature = weight, temperature
        self.set_class_names(class_names)
        self.adapt(ProgressivePrompts(num_tokens, carry))

    def loss(
        self, images: torch.Tensor | None, labels: torch.Tensor, features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Training loss and logits (batch, classes) of images (batch, 3, height, width) and labels (batch,)."""
        now = self.image_features(images)
        logits = self.classify(now)
        loss = self.class_loss(logits, labels)
        if not self.weight:
            return loss, logits
        with torch.autocast(now.device.type, enabled=False):
            scale = self.scale.to(now.dtype) if self.temperature is None else 1 / self.temperature
            likeness = scale * now @ frozen_image_features(self, images).mT
        own = torch.arange(len(now), device=now.device)
        return loss + self.weight * F.cross_entropy(likeness, own), logits
