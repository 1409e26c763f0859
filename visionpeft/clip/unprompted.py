"""The frozen CLIP under a learner that has changed it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from visionpeft.adapters.switch import use
from visionpeft.clip.learner import Learner


@contextmanager
def unprompted(learner: Learner) -> Iterator[None]:
    """Within the context, the CLIP computes without the adapter that the learner has attached to it."""
    if learner.adapter_name not in getattr(learner.clip, "peft", ()):
        yield
        return
    acting = learner.acting
    learner.acting = tuple(name for name in acting if name != learner.adapter_name)
    try:
        with use(learner.clip, learner.acting):
            yield
    finally:
        learner.acting = acting


@torch.no_grad()
def frozen_image_features(learner: Learner, images: torch.Tensor) -> torch.Tensor:
    """Unit image features (batch, features) of the CLIP without the learner's adapter."""
    with unprompted(learner):
        return learner.image_features(images)
