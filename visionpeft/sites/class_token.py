"""Of the last block of a tower that pools its class token, this token alone is followed after the attention."""

import torch.nn as nn

from visionpeft.sites import frozen_layers

# What says in a tower of timm or OpenCLIP which tokens are pooled, and how.
POOLING = ("global_pool", "pool_type", "attn_pool", "output_tokens")


class ClassTokenOnly:
    """Says of the last block of a tower that after its attention only the class token is followed.

    Args:
        tower: the tower, which pools its class token.
        block: its last block.
        norms: the norms after it.
    """

    def __init__(self, tower: nn.Module, block: nn.Module, norms: list[nn.Module]):
        around = [m for m in tower.modules() if m is not tower and any(inner is block for inner in m.modules())]
        self.seeing = [*block.modules(), *norms, *around]
        self.tower = tower
        self.pooling = {name: getattr(tower, name) for name in POOLING if hasattr(tower, name)}

    def others_are_read(self) -> bool:
        """Whether all tokens have to be there: a hook sees those of the block, or the tower was told to pool others,
        as by timm's `reset_classifier(classes, "avg")`.
        """
        exchanged = any(getattr(self.tower, name) != before for name, before in self.pooling.items())
        return exchanged or any(map(frozen_layers.is_hooked, self.seeing))
