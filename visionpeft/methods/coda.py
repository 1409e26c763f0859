"""CoDA: Conditional Adapters: Parameter-efficient Transfer Learning with Fast Inference (Lei et al., 2023).

https://arxiv.org/abs/2304.04947
"""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.tower import Tower
from visionpeft.errors import UnsupportedError
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require, to_parameter_dtype
from visionpeft.methods.parts.bottleneck import Bottleneck
from visionpeft.methods.parts.grid import require_patches
from visionpeft.sites import Order, Placement

ROUNDS = 20
FIRST, FALLING = 4.0, 0.7  # the temperature of the first round, and its ratio from round to round


def soft_top_k(scores: torch.Tensor, k: int, temperature: float) -> torch.Tensor:
    """Weights in (0, 1] that add up to at most k, and nearly to k unless e gets small: large for the k largest scores.

    Coordinate descent, 20 rounds from b = -s: a = e log k - e logsumexp((s + b) / e), b = -max(0, s + a), with e from 4
    down by factors of 0.7 to `temperature`; the weights are exp((s + a + b) / e).

    Args:
        scores: s, (..., number).
        k: how many are wanted.
        temperature: the last e; smaller is harder.
    """
    b = -scores
    for number in range(ROUNDS):
        e = max(temperature, FIRST * FALLING**number)
        a = e * math.log(k) - e * ((scores + b) / e).logsumexp(dim=-1, keepdim=True)
        b = -F.relu(scores + a)
    return ((scores + a + b) / e).exp()


class Passing(threading.local):
    """What one pass through a block carries from its entrance to its exit, in its own thread.

    Attributes:
        aside: all tokens, those that were sent through the block, which patches these are, and their weights.
    """

    aside: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def __reduce__(self):
        return Passing, ()  # of a copy: it is in no pass


class Select(nn.Module):
    """Sends the patches with the largest scores w . norm(x) through the block, and all tokens before the patches.

    w is N(0, 1 / width); the norm has no weights.

    Args:
        width: width of the tokens.
        reduction: one patch in so many is sent, rounded up.
        temperature: of `soft_top_k`.
    """

    order = Order.LEAVE  # after all else that acts on what enters the block
    located_at = "patches"
    narrows_tokens = True
    reads_all_patches = True

    def __init__(self, width: int, reduction: int, temperature: float):
        super().__init__()
        self.router = nn.Parameter(torch.randn(width) / math.sqrt(width))
        self.reduction = reduction
        self.temperature = temperature
        self.num_tokens = -reduction  # other rows of a batch would differ in length
        self.passing = Passing()

    def forward(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """Map tokens (batch, tokens, width), whose patches begin at `first`, to (batch, fewer, width)."""
        patches = to_parameter_dtype(x[:, first:], self.router)
        scores = F.layer_norm(patches, patches.shape[-1:]) @ self.router
        kept = -(-scores.shape[1] // self.reduction)
        precise = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = soft_top_k(precise, kept, self.temperature)
        chosen = scores.topk(kept, dim=1).indices
        sent = torch.cat((x[:, :first], x[:, first:].gather(1, _each(chosen, x))), dim=1)
        self.passing.aside = x, sent, chosen, weights.gather(1, chosen)
        return sent


class Spread(nn.Module):
    """Puts what the block has made of the tokens sent through it among all tokens, which all pass an adapter as well.

    x_i + A(norm(x_i)) + weight_i * (block(x)_i - x_i); of a patch that was not sent, without the last term.
    """

    order = Order.ENTER  # before all else that acts on what leaves the block

    def __init__(self, select: Select, adapter: Bottleneck):
        super().__init__()
        self.adapter = adapter
        self._select = (select,)  # in a tuple, because it has its own place in the adapter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map the tokens that were sent (batch, fewer, width) to all of them (batch, tokens, width)."""
        passing = self._select[0].passing
        (tokens, sent, chosen, weights), passing.aside = passing.aside, None
        first = sent.shape[1] - chosen.shape[1]
        changed = x - sent
        patches = (weights[..., None] * changed[:, first:]).to(x.dtype)
        spread = torch.zeros_like(tokens[:, first:]).scatter(1, _each(chosen, x), patches)
        beside = self.adapter(F.layer_norm(tokens, tokens.shape[-1:]))
        return tokens + beside + torch.cat((changed[:, :first], spread), dim=1)


def _each(chosen: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return chosen[..., None].expand(-1, -1, x.shape[-1])


@dataclass(frozen=True)
class CoDA(Method):
    """Blocks that see one patch in `reduction`: x + A(norm(x)) for all tokens, and the frozen block for the best few.

    In every chosen block a score w . norm(x) of each patch decides which k = patches / reduction of them pass the
    frozen block, attention among themselves and MLP; what it adds to them is multiplied by their weights of a soft
    top-k, which is how w learns. Class, register and prompt tokens always pass. All tokens pass a bottleneck adapter A
    beside the block. The last block of a tower that reads its class token alone stays as it is: its router would never
    learn. So a forward pass costs a third of the backbone's multiply-adds on ViT-B/16.
    How w, norm and product are put together is recalled from the paper, the rounds of the soft top-k read in published
    code of others. The frozen blocks have never seen few patches: the authors first train router and adapters on much
    data. On little data begin with few blocks, such as blocks="last:4". A is zero at the start, w is N(0, 1 / D). With
    reduction=1 and weights of one it is a parallel adapter.
    Not mergeable: it chooses by the image. Text towers are refused, clips, and towers whose attention has positions of
    its own (rotary or relative).
    Trainable on L blocks of width D and bottleneck h: L (2 D h + h + 2 D); 1,098,944 on ViT-B/16, 1,198,848 with the
    last block.
    Source: Lei et al., Conditional Adapters: Parameter-efficient Transfer Learning with Fast Inference, 2023.

    Args:
        bottleneck: width h of A.
        reduction: one patch in so many passes the block, rounded up; 3 to 5 in the paper, as recalled.
        temperature: of the soft top-k at its end; 0.02 to 1 in the paper, by task.
        dropout: dropout in the bottleneck.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers; by default the image tower.
    """

    bottleneck: int = 64
    reduction: int = 4
    temperature: float = 0.1
    dropout: float = 0.0
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("bottleneck", "reduction"):
            value = getattr(self, name)
            require(value > 0, self, f"{name} must be a positive integer")
        positive = 0 < self.temperature <= FIRST
        require(positive, self, f"temperature must be positive and at most {FIRST:g}, not {self.temperature}")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """A `Select` at the entrance and a `Spread` at the exit of every chosen block."""
        require_patches(self, tower)
        # Nothing reads what the last block makes of patches where the class token alone is read, so that a router there
        # would never learn.
        blocks = [i for i in blocks_of(self, tower) if not (tower.pools_class_token and i == tower.depth - 1)]
        require(
            len(blocks) > 0, self, "a router learns nothing in the last block of a tower that reads its class token"
        )
        if tower.frames is not None:
            raise UnsupportedError(
                "CoDA chooses patches of each image by itself, but the frames of a clip belong together"
            )
        if any(tower.blocks[index].knows_positions for index in blocks):
            raise UnsupportedError(
                "CoDA sends few patches through a block, but the attention of this tower has positions of its own, "
                "which it knows for all patches alone"
            )
        if any(map(tower.is_queried, blocks)):
            queried, count = tower.queried_blocks, tower.depth - tower.queried_blocks
            remedy = f"none of the last {queried} blocks (blocks='first:{count}')" if count else "another method"
            raise UnsupportedError(
                "CoDA sends few patches through a block, and the queries of a head say by their places which they see; "
                f"choose {remedy}"
            )
        for index in blocks:
            select = Select(tower.width, self.reduction, self.temperature)
            yield Placement(tower.name, index, "stream_in", select)
            adapter = Bottleneck(
                tower.width,
                self.bottleneck,
                activation="relu",
                scale=1.0,
                dropout=self.dropout,
                drop_path=0.0,
                init="lora",
                serial=False,
            )
            yield Placement(tower.name, index, "stream_out", Spread(select, adapter))
