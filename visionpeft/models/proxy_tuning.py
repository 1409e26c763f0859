"""Tuning Language Models by Proxy (Liu et al., 2024), https://arxiv.org/abs/2401.08565, on classifiers of images."""

import torch
import torch.nn as nn

from visionpeft.clip.learner import Learner
from visionpeft.errors import ConfigurationError


def proxy_logits(large: torch.Tensor, tuned: torch.Tensor, small: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """large + alpha (tuned - small): what a small model has learnt, added to what a large one says.

    Softmax makes probabilities of it; a constant added to all logits of an image, of any of the three, changes none.
    They must tell the same classes apart in the same order, of which only the number can be checked, and be logits of
    one scale: those of two CLIPs are divided by their own exp(logit_scale) first, which `ProxyTuned` does.
    Source: Liu et al., Tuning Language Models by Proxy, 2024, where the classes are the words of a vocabulary.

    Args:
        large: logits (batch, classes) of the large model, which may be remote.
        tuned: those of the tuned small one.
        small: those of the small one before it was tuned.
        alpha: how much of the change is added; the paper has 1.

    Raises:
        ConfigurationError: the three differ in shape.
    """
    shapes = [tuple(logits.shape) for logits in (large, tuned, small)]
    if len(set(shapes)) > 1:
        raise ConfigurationError(
            f"proxy-tuning needs logits of one shape, (batch, classes), not {', '.join(map(str, shapes))}; give three "
            "models with the same classes"
        )
    return large + alpha * (tuned - small).to(large)


class ProxyTuned(nn.Module):
    """A large classifier steered by a small one: logits l + alpha (t - s) of a large, a tuned and a small model.

    Nothing is trained, and three models run. Of CLIP learners, whose logits are cosines times exp(logit_scale), the
    change is brought from the scales of the small ones to that of the large one; of other models it is taken as it is,
    so that it should be one whose head has learnt the same classes in the same way. With alpha = 0, or while the small
    model was not tuned, it is the large model.
    Source: Liu et al., Tuning Language Models by Proxy, 2024.

    Args:
        large: maps images (batch, 3, height, width) to logits (batch, classes).
        tuned: likewise, tuned.
        small: what `tuned` was before.
        alpha: how much of the change is added; the paper has 1.

    Raises:
        ConfigurationError: learners with other class names, or some of the three are learners and some are not.
    """

    def __init__(self, large: nn.Module, tuned: nn.Module, small: nn.Module, alpha: float = 1.0):
        super().__init__()
        models = {"large": large, "tuned": tuned, "small": small}
        learners = [name for name, model in models.items() if isinstance(model, Learner)]
        if len(learners) not in (0, 3):
            raise ConfigurationError(
                f"only {' and '.join(learners)} of the three models is a CLIP learner, whose logits have a scale of "
                "their own; give three learners, or none"
            )
        for name in learners:
            if models[name].class_names != large.class_names:
                raise ConfigurationError(
                    f"the {name} model has the classes {', '.join(models[name].class_names)}, and the large one "
                    f"{', '.join(large.class_names)}; give them the same, in the same order"
                )
        self.large, self.tuned, self.small = large, tuned, small
        self.alpha = alpha

    def forward(self, images: torch.Tensor, small_images: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (batch, classes).

        Args:
            images: as the large model wants them.
            small_images: the same images as the small ones want them, where that is another size or normalisation.

        Raises:
            ConfigurationError: the models have different numbers of classes.
        """
        read = images if small_images is None else small_images
        large, tuned, small = self.large(images), self.tuned(read), self.small(read)
        if isinstance(self.large, Learner):
            tuned = tuned * (self.large.scale / self.tuned.scale)
            small = small * (self.large.scale / self.small.scale)
        return proxy_logits(large, tuned, small, self.alpha)
