"""Masking as an Efficient Alternative to Finetuning for Pretrained Language Models (Zhao et al., 2020).

https://arxiv.org/abs/2004.12406
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.methods.parts.trees import tree_of
from visionpeft.methods.parts.weight_change import WeightChange
from visionpeft.sites import Order, Placement

THRESHOLD, LOWEST = 0.01, -0.02


class LearnedMask(WeightChange):
    """(W0 * M) x + b with M = 1 where a score is above 0.01, else 0; the gradient of M is that of the scores (out, in).

    Scores start uniform in (-0.02, s), s such that the share `masked` is expected at or below 0.01; with none masked,
    all start at 0.02.
    """

    order = Order.RENEW

    def __init__(self, out_features: int, in_features: int, masked: float):
        super().__init__()
        highest = (THRESHOLD - LOWEST) / masked + LOWEST if masked else 2 * THRESHOLD
        lowest = LOWEST if masked else highest
        self.scores = nn.Parameter(torch.empty(out_features, in_features).uniform_(lowest, highest))

    def change(self, like: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """W0 * (M - 1), exactly -W0 or zero."""
        scores = self.scores.to(like)
        through = scores - scores.detach()  # zero, with the gradient of the scores
        return weight * ((self.scores > THRESHOLD).to(like) + through - 1)

    def fixed(self) -> "FixedMask":
        """The same mask, one bit for each weight."""
        mask = FixedMask(*self.scores.shape)
        bits = np.packbits((self.scores > THRESHOLD).flatten().cpu().numpy())
        mask.bits.copy_(torch.from_numpy(bits))
        return mask.to(self.scores.device)


class FixedMask(WeightChange):
    """`LearnedMask` with a mask that is no longer trained: eight bits in a byte, the first one in the highest place."""

    order = Order.RENEW

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.shape = out_features, in_features
        self.register_buffer("bits", torch.zeros(-(-out_features * in_features // 8), dtype=torch.uint8))

    def change(self, like: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """W0 * (M - 1), exactly -W0 or zero."""
        places = torch.arange(7, -1, -1, device=self.bits.device, dtype=torch.uint8)
        mask = (self.bits[:, None] >> places) & 1
        return weight * (mask.flatten()[: weight.numel()].view(self.shape).to(like) - 1)


@dataclass(frozen=True)
class BinaryMask(Method):
    """Learns which weights to keep: W0 * M with a mask M of zeros and ones, and no other change.

    M is 1 where a trained score is above 0.01, and its gradient is passed to the score as it is (straight through). So
    that the share `masked` is zero at the start, scores are uniform in (-0.02, 0.03 / masked - 0.02), as published;
    with `masked=0`, this library's option, all are 0.02 and nothing changes at the start, because a ViT does not bear
    random zeros well. Acts on the rows of q, k and v separately, on the backbone's own weight, before other methods
    change it; biases stay. Weights without a score as large have no say in others: all that counts of a score is on
    which side of 0.01 it is. While training, scores and gradients are as many as weights: as dear as full fine-tuning.
    Saved is one bit for each weight, 10.6 MB on ViT-B/16; a loaded mask is fixed, and only the head beside it can be
    trained further. Mergeable into W0 or zero, bit by bit, but not two of them at one layer. The published form that
    chooses the first zeros by magnitude is not built.
    Trainable: sum over target layers of in * out; 84,934,656 on ViT-B/16 for all matrices of the blocks.
    Source: Zhao, Lin, Mi, Jaggi, Schütze, Masking as an Efficient Alternative to Finetuning for Pretrained Language
    Models, 2020, and the authors' code; cf. Piggyback (Mallya et al., 2018). That 5 % are masked at the start is
    recalled.

    Args:
        masked: expected share of zeros at the start.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        fixed: whether the mask is no longer trained; written when an adapter is saved, not to be given.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    found: ClassVar[tuple[str, ...]] = ("fixed",)

    masked: float = 0.05
    targets: tuple[str, ...] = ("q", "k", "v", "proj", "fc1", "fc2")
    fixed: bool | None = None
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.masked < 1, self, f"masked must be in [0, 1), not {self.masked}")
        require_targets(self)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One mask at every target layer of the chosen blocks."""
        for index, layer in target_layers(self, tower):
            shape = tuple(layer.matrix.shape)
            module = FixedMask(*shape) if self.fixed else LearnedMask(*shape, self.masked)
            yield Placement(tower.name, index, layer.site, module)

    def fold(self, part: nn.Module) -> tuple[Method, nn.Module]:
        """The masks without scores."""
        modules = {path: module for path, module in part.named_modules() if isinstance(module, LearnedMask)}
        if not modules:
            return self, part
        return dataclasses.replace(self, fixed=True), tree_of({path: m.fixed() for path, m in modules.items()})

    def combine(self, methods, parts, weights):
        """Of equal masks, that mask: others have no weighted sum."""
        same = all(torch.equal(tensor, part[name]) for name, tensor in parts[0].items() for part in parts)
        require(same, self, "different masks cannot be combined, a weight is kept or it is not")
        return super().combine(methods, parts, weights)
