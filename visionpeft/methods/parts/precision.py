"""Which precision an adapter computes in when the backbone's differs from its own."""

import torch
import torch.fx


def to_parameter_dtype(x: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """x in the dtype of a float32 parameter, unless autocast chooses the dtype of each operation itself."""
    return _to_unless_autocast(x, parameter.dtype)


@torch.fx.wrap  # traced by torch.fx, tokens have no device to ask for
def _to_unless_autocast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)
