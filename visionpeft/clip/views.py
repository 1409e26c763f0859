"""Several views of an image, on which test-time methods decide: drawn, encoded, chosen by their entropy."""

import math

import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2.functional import resized_crop

from visionpeft.adapters.adapters import has_adapters
from visionpeft.clip.learner import Learner
from visionpeft.clip.model import check_prepared
from visionpeft.clip.template_texts import TemplateTexts
from visionpeft.errors import ConfigurationError

PIXELS_AT_A_TIME = 4 * 224 * 224


def features_of_views(learner: Learner, images: torch.Tensor, num_views: int) -> torch.Tensor:
    """Unit features (batch, views, features) of views (batch, views, 3, height, width), without a graph.

    Of images (batch, 3, height, width), `num_views` are drawn.

    Raises:
        ConfigurationError: as `views_of`.
    """
    views = views_of(learner, images, num_views)
    flat = views.flatten(0, 1)
    with torch.no_grad():
        parts = [Learner.image_features(learner, part) for part in flat.split(images_at_a_time(learner, flat))]
        return torch.cat(parts).unflatten(0, views.shape[:2])


def views_of(learner: Learner, images: torch.Tensor, num_views: int) -> torch.Tensor:
    """Views (batch, views, 3, height, width): those given, or `num_views` drawn of images (batch, 3, height, width).

    Raises:
        ConfigurationError: no tensor of floating point numbers, or another shape.
    """
    check_prepared(images)
    if images.ndim not in (4, 5) or images.shape[-3] != 3:
        raise ConfigurationError(
            f"{type(learner).__name__} takes views (batch, views, 3, height, width) or images (batch, 3, height, "
            f"width), not {tuple(images.shape)}; convert gray images to RGB"
        )
    return images if images.ndim == 5 else draw_views(images, num_views)


def images_at_a_time(learner: Learner, images: torch.Tensor) -> int:
    """How many images (images, 3, height, width) the image tower takes at a time without a graph.

    On a CPU as many as have the pixels of four of 224 x 224: their hidden activations stay in its caches, and memory
    is used again instead of being asked for anew. All of them elsewhere, and where each has an adapter of its own.
    """
    routed = has_adapters(learner.clip) and learner.clip.peft.routing.current() is not None
    if images.device.type != "cpu" or routed:
        return max(1, len(images))
    return max(1, PIXELS_AT_A_TIME // (images.shape[-2] * images.shape[-1]))


def check_views(learner: Learner, features: torch.Tensor) -> None:
    """Refuse features of one view only.

    Raises:
        ConfigurationError: not (batch, views, features).
    """
    if features.ndim != 3:
        raise ConfigurationError(
            f"{type(learner).__name__} decides on several views of an image; pass features (batch, views, features), "
            f"not {tuple(features.shape)}"
        )


def check_selection(selection: float, num_views: int = 1) -> None:
    """Refuse what is no share or no number of views.

    Raises:
        ConfigurationError: a share outside (0, 1], or no whole number of at least one view.
    """
    if not isinstance(num_views, int) or num_views < 1 or not 0 < selection <= 1:
        raise ConfigurationError(
            f"num_views must be an integer of at least 1 and selection between 0 and 1, not num_views={num_views} and "
            f"selection={selection}"
        )


def by_confidence(logits: torch.Tensor) -> torch.Tensor:
    """Indices (batch, views) of the views from the lowest entropy of logits (batch, views, classes) to the highest."""
    probabilities = logits.log_softmax(dim=-1)
    entropies = -(probabilities.exp() * probabilities).sum(dim=-1)
    return entropies.argsort(dim=1, stable=True)


def number_chosen(views: int, selection: float) -> int:
    """How many of the views are chosen: the share, rounded down, and at least one."""
    return max(1, int(views * selection))


def confident(features: torch.Tensor, logits: torch.Tensor, selection: float) -> torch.Tensor:
    """Of features (batch, views, features) those whose logits (batch, views, classes) have the lowest entropy."""
    chosen = by_confidence(logits)[:, : number_chosen(logits.shape[1], selection)]
    return features.take_along_dim(chosen[..., None], dim=1)


def marginal_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy (batch,) of the mean over views of the probabilities that logits (batch, views, classes) give."""
    mean = logits.log_softmax(dim=-1).logsumexp(dim=1) - math.log(logits.shape[1])
    mean = mean.clamp(min=torch.finfo(mean.dtype).min)
    return -(mean.exp() * mean).sum(dim=-1)


def draw_views(images: torch.Tensor, num_views: int) -> torch.Tensor:
    """Views (batch, views, 3, height, width) of images (batch, 3, height, width): the image, then random crops of it.

    A crop has 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3, is resized bilinearly to the size of the image,
    and is flipped with probability 1/2.
    """
    size = list(images.shape[-2:])

    def crop(image: torch.Tensor) -> torch.Tensor:
        box = RandomResizedCrop.get_params(image, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
        view = resized_crop(image, *box, size=size, antialias=True)
        return view.flip(-1) if torch.rand(()) < 0.5 else view

    return torch.stack([torch.stack([image, *(crop(image) for _ in range(num_views - 1))]) for image in images])


class FromViews(TemplateTexts):
    """Base of learners that decide on `num_views` views of each image and the texts of templates.

    They take views (batch, views, 3, height, width), view 0 being plain, and draw the others of images themselves.
    """

    # Views are drawn anew, so that image features cannot be kept.
    frozen_images = False
    by_gradient = False
    adapts_while_testing = True

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Unit features (batch, views, features) of views (batch, views, 3, height, width), or of images."""
        return features_of_views(self, images, self.num_views)
