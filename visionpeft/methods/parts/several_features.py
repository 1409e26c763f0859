"""A head that reads several features: what the model pools, and what was gathered from its blocks on the way."""

import threading

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.errors import UnsupportedError
from visionpeft.sites.routing import in_backward


class Gathered(threading.local):
    """What one pass brings from the blocks to the head, in its own thread.

    Args:
        number: from how many blocks.
    """

    def __init__(self, number: int):
        self.number = number
        self.found: dict[int, torch.Tensor] = {}
        self.again: list[torch.Tensor] = []  # of a pass that is computed once more, from its first block on

    def __reduce__(self):
        return Gathered, (self.number,)  # of a copy: it is in no pass

    def put(self, index: int, z: torch.Tensor) -> None:
        """Bring features z (batch, tokens, width) from a block; not when that block alone is computed again."""
        if not in_backward():
            self.found[index], self.again = z, []
            return
        # With gradient checkpointing blocks run once more in the backward pass: each for itself, from the last to the
        # first, when the head has long read what they gave; or all of them and the head, where the whole model is
        # checkpointed, and then they come in their order.
        if index == 0:
            self.again = []
        if index == len(self.again):
            self.again.append(z)

    def take(self) -> list[torch.Tensor]:
        """The features of all blocks in their order, which are then gone.

        Raises:
            UnsupportedError: there was no pass through all blocks.
        """
        if in_backward():
            found, self.again = dict(enumerate(self.again)), []
        else:
            found, self.found = self.found, {}
        if len(found) != self.number:
            raise UnsupportedError(
                "this head reads what queries got in every block, so that it cannot be called with pooled features "
                "alone; call the whole model"
            )
        return [found[index] for index in range(self.number)]


class SeveralFeatures(nn.Linear):
    """A linear layer on [u(f); u(z_1); ...; u(z_L)], u(z) a part as one vector, divided by its length.

    f is what the model pools, z_l are gathered from its blocks.
    """

    gathered: Gathered | None = None  # that of the adapter's own queries, given when it is attached

    @classmethod
    def over(cls, head: nn.Module, more: int) -> "SeveralFeatures":
        """The trained head in the place of a linear one, over `more` features besides its own.

        Columns for its own features and the bias are those of the head, others start as PyTorch has them.

        Raises:
            UnsupportedError: the head is not linear.
        """
        if type(head) is not nn.Linear:
            raise UnsupportedError(
                f"a head over several features is made in the place of a linear one, not of a {type(head).__name__}"
            )
        made = cls(head.in_features + more, head.out_features, head.bias is not None)
        made.to(head.weight.device, head.weight.dtype)
        with torch.no_grad():
            made.weight[:, : head.in_features] = head.weight
            if head.bias is not None:
                made.bias.copy_(head.bias)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map pooled features f (batch, width) to logits (batch, classes)."""
        return F.linear(self._joined(x), self.weight, self.bias)

    def by_row(self, x: torch.Tensor) -> torch.Tensor:
        """The same, with a product of its own for each row."""
        return torch.cat([F.linear(row, self.weight, self.bias) for row in self._joined(x).split(1)])

    def _joined(self, x: torch.Tensor) -> torch.Tensor:
        """[u(f); u(z_1); ...; u(z_L)] (batch, in) of pooled features f (batch, width)."""
        if self.gathered is None:
            raise UnsupportedError("this head reads what an adapter gathers, and it has no adapter")
        if x.ndim != 2:
            raise UnsupportedError(
                f"this head reads one vector for each image, and the model gives it {tuple(x.shape)}; let it pool "
                "(global_pool='token' or 'avg')"
            )
        parts = [x, *(z.flatten(1).to(x.dtype) for z in self.gathered.take())]
        return torch.cat([F.normalize(part, dim=-1) for part in parts], dim=-1)
