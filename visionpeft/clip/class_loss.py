"""How a learner compares an image with its classes: one class of all, or a yes or no for each pair.

A softmax is what CLIP was trained with, and what papers on learners use, on SigLIP, too. SigLIP itself was trained to
say of each pair of an image and a text whether they belong together (Zhai et al., Sigmoid Loss for Language Image
Pre-Training, 2023, arXiv 2303.15343).
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from visionpeft.errors import ConfigurationError

ClassLoss = Literal["cross_entropy", "sigmoid"]


def check_class_loss(loss: str, clip: nn.Module, takes_sigmoid: bool, learner: str) -> None:
    """Refuse a loss that a learner or its CLIP does not have.

    Args:
        loss: its name.
        clip: the CLIP.
        takes_sigmoid: whether the learner compares pairs, if it is told to.
        learner: its name, for an error.

    Raises:
        ConfigurationError: an unknown loss, or "sigmoid" where the learner has no form with it or the CLIP no bias.
    """
    if loss not in get_args(ClassLoss):
        raise ConfigurationError(f"loss must be one of {', '.join(get_args(ClassLoss))}, not {loss!r}")
    if loss == "cross_entropy":
        return
    if not takes_sigmoid:
        raise ConfigurationError(
            f"{learner} has no form with loss 'sigmoid': what it learns, fits or adapts compares the classes with one "
            "another; leave the loss at 'cross_entropy', or take a learner such as CoOp, MaPLe or CLIPAdapter"
        )
    if getattr(clip, "logit_bias", None) is None:
        raise ConfigurationError(
            "loss 'sigmoid' is for a CLIP with a logit_bias, such as SigLIP, which was trained with it; without one "
            "all pairs of an image and a class are as good as certain: leave the loss at 'cross_entropy'"
        )


def class_loss(loss: ClassLoss, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean loss () of the images of a batch, of logits (batch, classes) and labels (batch,).

    "cross_entropy" is that of the softmax over the classes. "sigmoid" is SigLIP's loss with a class for each text,
    -1/B sum_i sum_k log sigmoid(z_ik l_ik) with z_ik = 1 for the class of image i and -1 for every other.
    """
    if loss == "cross_entropy":
        return F.cross_entropy(logits, labels)
    pairs = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, pairs, reduction="sum") / len(labels)


def class_probabilities(loss: ClassLoss, logits: torch.Tensor) -> torch.Tensor:
    """What logits (batch, classes) say of each class: its share of 1, or of "sigmoid" whether image and class fit."""
    return logits.softmax(dim=-1) if loss == "cross_entropy" else logits.sigmoid()
