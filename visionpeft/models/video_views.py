"""Several views of a video, tested by the mean of their predictions."""

import math
from collections.abc import Callable

import torch


def over_views(model: Callable[[torch.Tensor], torch.Tensor], views: torch.Tensor) -> torch.Tensor:
    """Log of the class probabilities averaged over the views of each video: log(mean_v softmax(model(view_v))).

    Args:
        model: clips (batch, channels, frames, height, width) -> logits (batch, classes).
        views: (batch, views, channels, frames, height, width); one view of all videos is computed at a time.

    Returns:
        (batch, classes), of which a softmax gives the averaged probabilities.
    """
    each = torch.stack([model(clips).float().log_softmax(dim=-1) for clips in views.unbind(1)])
    return each.logsumexp(dim=0) - math.log(len(each))
