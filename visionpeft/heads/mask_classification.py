"""What heads share that predict masks and the class of each: queries, what is made of them, masked attention.

A query is a token that stands for one mask. From its vector come logits of K + 1 classes, the last of which is
"nothing", and, with the patches at four times their resolution, the logits of its mask.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from visionpeft.errors import ConfigurationError
from visionpeft.heads.base import DenseHead, DenseModule

POWER = 0.9  # of the annealing
BEGINS = (1 / 6, 2 / 3)  # shares of the training at which the first and the last block begin to lose their masks
LENGTH = 1 / 6  # share of the training that it takes a block


@dataclass
class MaskPredictions:
    """Masks of Q queries and their classes, predicted before each masked block and at the end.

    Args:
        masks: logits (batch, Q, rows, columns), one for each prediction.
        classes: logits (batch, Q, K + 1), the last of them of "nothing", likewise.
    """

    masks: list[Tensor]
    classes: list[Tensor]

    @property
    def scores(self) -> Tensor:
        """sum_q softmax(classes_q)_k sigmoid(masks_q) of the last prediction, without "nothing": (batch, K, h, w)."""
        return scores_of(self.masks[-1], self.classes[-1])

    def to(self, dtype: torch.dtype) -> "MaskPredictions":
        """The same in another precision."""
        return MaskPredictions([each.to(dtype) for each in self.masks], [each.to(dtype) for each in self.classes])


def scores_of(masks: Tensor, classes: Tensor) -> Tensor:
    """What a pixel scores for each class, (batch, K, h, w); see `MaskPredictions.scores`."""
    return torch.einsum("bqk,bqhw->bkhw", classes.softmax(-1)[..., :-1], masks.sigmoid())


class MaskModule(DenseModule):
    """A head of queries. In training mode it gives `MaskPredictions`, otherwise the scores of the last of them.

    Outside of training nothing is masked, which is how it is used in the end.

    Args:
        channels: D.
        num_classes: K.
        queries: Q.
        upscale: how often the resolution of the patches is doubled for the masks.
        progress: how much of the training is over, from 0 to 1; the masks of the attention depend on it.
    """

    gives_scores = True

    def __init__(self, channels: int, num_classes: int, queries: int, upscale: int):
        super().__init__()
        self.progress = 0.0
        self.queries = nn.Parameter(torch.randn(queries, channels))
        self.classify = nn.Linear(channels, num_classes + 1)
        self.mask = nn.Sequential(
            *(nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels), nn.GELU()),
            nn.Linear(channels, channels),
        )
        self.upscale = nn.Sequential(*(_Doubling(channels) for _ in range(upscale)))

    def predict(self, queries: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of masks (batch, Q, h, w) and of classes (batch, Q, K + 1).

        Args:
            queries: (batch, Q, D), normalised.
            patches: (batch, D, rows, columns), normalised.
        """
        return torch.einsum("bqd,bdhw->bqhw", self.mask(queries), self.upscale(patches)), self.classify(queries)

    def answered(self, predictions: MaskPredictions) -> MaskPredictions | Tensor:
        """What the head gives in its mode."""
        return predictions if self.training else predictions.scores

    def open(self, masks: Tensor, size: Sequence[int], index: int, blocks: int) -> Tensor:
        """Which patches the queries see in a masked block, True where they do: (batch, Q, rows * columns).

        A query sees the patches where the logit of its mask is above 0, resized bilinearly to the patches; in a block
        that has begun to lose its masks, a share of the queries, drawn at random, sees all of them.

        Args:
            masks: logits (batch, Q, h, w), as predicted before the block.
            size: rows and columns of patches.
            index: number of the block among the masked ones.
            blocks: how many there are.
        """
        seen = F.interpolate(masks.detach(), size=tuple(size), mode="bilinear").flatten(2) > 0
        share = share_masked(self.progress, index, blocks)
        if share < 1:
            seen = seen | (torch.rand(seen.shape[:2], device=seen.device) > share)[..., None]
        return seen


class _Doubling(nn.Sequential):
    """Twice the resolution: transposed convolution, GELU, convolution of each channel by itself, layer norm."""

    def __init__(self, channels: int):
        super().__init__(
            nn.ConvTranspose2d(channels, channels, 2, stride=2),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            LayerNorm2d(channels),
        )


def share_masked(progress: float, index: int, blocks: int) -> float:
    """The share of queries whose attention is masked in a block after a share t of the training.

    1 until t_i, then (1 - (t - t_i) / (1/6))^0.9, and 0 from t_i + 1/6 on, where t_i = 1/6 + i / (2 (L - 1)).
    So are the steps in EoMT's configurations: read for three blocks, recalled for four.

    Args:
        progress: t.
        index: i, the number of the block among the masked ones.
        blocks: L.
    """
    first, last = BEGINS
    begin = first + (last - first) * index / max(blocks - 1, 1)
    done = (progress - begin) / LENGTH
    return (1 - min(max(done, 0.0), 1.0)) ** POWER


def attention_mask(seen: Tensor, before: int) -> Tensor:
    """Which token sees which, True where it does: (batch, 1, tokens, tokens), all but the queries everything.

    Args:
        seen: the patches that queries see, (batch, Q, patches).
        before: number of tokens before the queries, which stand directly before the patches.
    """
    batch, queries, patches = seen.shape
    tokens = before + queries + patches
    mask = seen.new_ones(batch, tokens, tokens)
    mask[:, before : before + queries, before + queries :] = seen
    return mask[:, None]


def check_queries(head: DenseHead) -> None:
    """Refuse numbers of queries and of doublings that are none.

    Raises:
        ConfigurationError: fewer than one query, or a negative number of doublings.
    """
    name = type(head).__name__
    if head.queries < 1:
        raise ConfigurationError(f"{name}: queries must be at least 1, not {head.queries}")
    if head.upscale < 0:
        raise ConfigurationError(f"{name}: upscale must not be negative, not {head.upscale}")


def rotations(size: Sequence[int], width: int, like: Tensor, base: float = 100.0) -> Tensor:
    """Sines and cosines of rotary positions of patches, (rows * columns, 2 width), for timm's `apply_rot_embed_cat`.

    A patch lies at 2 (i + 1/2) / rows - 1 and likewise for columns; the angles are 2 pi times that over
    base^(4 j / width), j from 0 to width / 4 - 1, for rows and then for columns, the same for both halves of the width.

    Args:
        size: rows and columns.
        width: of a head, a multiple of 4.
        like: for device and dtype.
        base: of the periods.
    """
    with torch.autocast(like.device.type, enabled=False):
        sides = [2 * (torch.arange(side, device=like.device, dtype=torch.float32) + 0.5) / side - 1 for side in size]
        places = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, 1)
        periods = base ** (torch.arange(width // 4, device=like.device, dtype=torch.float32) * (4 / width))
        angles = (2 * math.pi * places[:, :, None] / periods).flatten(1).tile(2)
        return torch.cat([angles.sin(), angles.cos()], dim=-1).to(like.dtype)
