"""What stands in for methods of the library's own modules while adapters act, and is taken away with them."""

import torch.nn as nn

from visionpeft.adapters.installation import FUSING, Swaps
from visionpeft.adapters.layer_decay import GroupMatcher, NoWeightDecay
from visionpeft.backbones.tower import Tower
from visionpeft.errors import UnsupportedError

SHALLOW = "shallow prompts travel between the blocks; use VPT(deep=True)"


class Refused:
    """Stands in for a method that cannot be used.

    Args:
        reason: the sentence that says so.
    """

    def __init__(self, reason: str):
        self.reason = reason

    def __call__(self, *args, **kwargs):
        """Refuse."""
        raise UnsupportedError(self.reason)


class NoIntermediates(Refused):
    """Stands in for `forward_intermediates` while blocks give other tokens than the backbone's.

    Args:
        why: what they give, and what to do about it.
    """

    def __init__(self, why: str):
        super().__init__(f"forward_intermediates cannot be used while {why}")
        self.why = why


def refuse_intermediates(swaps: Swaps, tower: Tower, why: str) -> None:
    """Refuse `forward_intermediates` of a tower."""
    for module in tower.spanning:
        swaps.swap(module, swaps.kind(module), forward_intermediates=NoIntermediates(why))


def refuse_fusing(swaps: Swaps, model: nn.Module) -> None:
    """Refuse to fuse layers, such as by timm's `reparameterize_model`, where adapters act in what would be fused."""
    for path, module in model.named_modules(memo={model.peft}):
        methods = [name for name in FUSING if callable(getattr(module, name, None))]
        if methods and any(inner in swaps.kinds for inner in module.modules()):
            refused = Refused(
                f"{path or type(module).__name__} cannot be fused while adapters act in it, which are no part of its "
                "weights; merge first (visionpeft.merge), or fuse the model before you attach"
            )
            swaps.swap(module, swaps.kind(module), **dict.fromkeys(methods, refused))


def know_adapters(swaps: Swaps, model: nn.Module) -> None:
    """Let the methods by which timm's optimisers ask a model for its parameters know those of adapters."""
    for name, stand_in in (("group_matcher", GroupMatcher), ("no_weight_decay", NoWeightDecay)):
        if hasattr(model, name):
            swaps.swap(model, swaps.kind(model), **{name: stand_in(model)})
