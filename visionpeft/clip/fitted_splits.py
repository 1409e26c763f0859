"""The images that a learner is fitted on, checked."""

import torch

from visionpeft.clip.learner import Learner
from visionpeft.errors import ConfigurationError

Split = tuple[torch.Tensor, torch.Tensor]


def check_splits(learner: Learner, train: Split, validation: Split | None = None) -> None:
    """Refuse features (images, ...) with labels (images,) that `fit_features` cannot learn from.

    Raises:
        ConfigurationError: a split without images, or a label that no class has.
    """
    classes = len(learner.class_names)
    for name, split in (("training", train), ("validation", validation)):
        labels = None if split is None else split[1]
        if labels is not None and not (len(labels) and 0 <= int(labels.min()) <= int(labels.max()) < classes):
            raise ConfigurationError(
                f"{type(learner).__name__} needs {name} images with labels 0 to {classes - 1} for its {classes} class "
                "names"
            )
