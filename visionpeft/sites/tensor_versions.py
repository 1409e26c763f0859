"""Whether a tensor was written to since it was looked at."""

import torch


def version_of(tensor: torch.Tensor) -> object:
    """How often a tensor was written to; of one made in inference mode, where nobody counts, what equals nothing."""
    return object() if tensor.is_inference() else tensor._version
