"""Choose exact economies for a model with adapters."""

from typing import Literal

from torch import nn

from visionpeft.adapters.access import on_model
from visionpeft.adapters.adapters import attached
from visionpeft.adapters.economies import Economies, may_narrow
from visionpeft.adapters.install import install
from visionpeft.adapters.selfcheck import check_tower
from visionpeft.adapters.switch import plain
from visionpeft.backbones.tower import Tower
from visionpeft.backbones.whole_model import describe
from visionpeft.errors import UnsupportedError


@on_model
def economise(
    model: nn.Module, *, class_token_only: bool | None = False, recompute: Literal["mlp", "block"] | None = None
) -> nn.Module:
    """Choose exact economies for a model with adapters; without arguments, none. Outputs and gradients stay the same.

    They hold while adapters act, whichever they are.

    Args:
        model: the model.
        class_token_only: in the last block of an image tower that pools its class token, compute queries, projection
            and MLP for this token alone. What the blocks give, such as timm's `forward_features`, is then that token.
            It stands aside, and all tokens are there, while a hook sees them, while a batch is routed, and if an active
            method mixes tokens after the attention of this block; `forward_intermediates` is refused. None chooses it
            where the tower allows it.
        recompute: "mlp" computes the hidden activations of every MLP again in the backward pass instead of keeping
            them, "block" all activations of every block, by the library's own gradient checkpointing.

    Returns:
        The model.

    Raises:
        ConfigurationError: if the model has no adapters, or there is no such choice.
        UnsupportedError: if the image tower pools its tokens in another way.
    """
    peft = attached(model)
    with plain(model):
        towers = describe(model).towers
        if class_token_only is None:
            class_token_only = may_narrow(towers) and _can_be_sited(towers["visual"], towers["visual"].depth - 1)
        chosen = Economies(class_token_only, recompute)
        chosen.check(towers)
        for tower in towers.values():
            check_tower(tower, {index: set() for index in range(tower.depth) if chosen.need(tower, index)})
    peft.economies = chosen
    peft.forget()
    install(model)
    return model


def _can_be_sited(tower: Tower, index: int) -> bool:
    """Whether the sited form of a block computes what the block does."""
    try:
        check_tower(tower, {index: set()})
    except UnsupportedError:
        return False
    return True
