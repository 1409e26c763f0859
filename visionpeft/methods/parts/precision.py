"""Which precision an adapter computes in when the backbone's differs from its own."""

import torch


def to_parameter_dtype(x: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """x in the dtype of a float32 parameter, unless autocast chooses the dtype of each operation itself."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(parameter.dtype)
