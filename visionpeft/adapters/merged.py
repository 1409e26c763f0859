"""Merged adapters, which are no part of the model, made part of it again."""

import torch.nn as nn

from visionpeft.adapters.adapters import Adapters, elsewhere
from visionpeft.backbones.quantised import check_product, is_quantised
from visionpeft.errors import ConfigurationError, UnsupportedError


def reattach(model: nn.Module) -> None:
    """Make merged adapters part of the model again; the next `install` gives it back its own weights.

    Raises:
        ConfigurationError: if no adapters are merged.
        UnsupportedError: the model was moved to a precision that its quantised weights cannot follow to.
    """
    peft: Adapters | None = model.__dict__.get("merged_peft")
    if peft is None:
        raise ConfigurationError(f"the model has no merged adapters{elsewhere(model)}")
    moved = [
        (original, getattr(owner, name))
        for owner, name, original, _ in peft.replaced
        if not isinstance(original, nn.Module) and is_quantised(original)
    ]
    for original, now in moved:
        try:
            check_product("unmerge", original.detach().to(now.device, now.dtype), now.dtype)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"the model was moved to {str(now.dtype).removeprefix('torch.')} while it was merged, to which its own "
                f"{type(original).__name__} weights cannot follow; move it back first"
            ) from error
    del model.__dict__["merged_peft"]
    # Merged adapters are not registered, so they did not follow the model to another device.
    peft.to(next(model.parameters()).device)
    if peft.training != model.training:  # nor to another mode
        peft.train(model.training)
    for owner, name, original, _ in peft.replaced:  # nor did the originals to another precision
        now = getattr(owner, name)
        if isinstance(original, nn.Module):
            original.to(next((parameter.dtype for parameter in now.parameters()), None))
        elif is_quantised(original):
            # As `model.to` does it, which keeps the parameter and puts new integers and scales into it.
            holder = nn.Module()
            holder.register_parameter("original", original)
            holder.to(now.device, now.dtype)
        else:
            original.data = original.data.to(now.dtype)
    model.add_module("peft", peft)
