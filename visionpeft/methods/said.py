"""Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning (Aghajanyan et al., 2021).

https://arxiv.org/abs/2012.13255
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.seeded import raw_numbers
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.methods.parts.weight_change import WeightChange
from visionpeft.sites import Placement, Shared


class Subspace(nn.Module):
    """The coordinates z (number,) of all changes in the subspace, zero at the start."""

    def __init__(self, number: int):
        super().__init__()
        self.z = nn.Parameter(torch.zeros(number))


class Fastfood(WeightChange):
    """W + scale * P z, where P is a random projection to the shape of W that needs no matrix.

    P z is the first `size` = out * in numbers of H diag(g) Pi H diag(b) [z; 0], divided by sqrt(size * sum g^2): with
    the next power of two n, H is the Walsh-Hadamard matrix (n, n) of ones and minus ones, b random signs, Pi a random
    permutation and g normal. So |P z| is |z| on average. scale (1,) starts at 1.
    """

    def __init__(self, subspace: Subspace, out_features: int, in_features: int, seed: tuple[int, ...]):
        super().__init__()
        self._subspace = (subspace,)  # in a tuple, because the adapter owns it once for all layers
        self.shape = out_features, in_features
        length = hadamard_length(out_features * in_features)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("signs", _signs(len(subspace.z), *seed, 0), persistent=False)
        permutation = torch.from_numpy(raw_numbers(length, *seed, 1).argsort(kind="stable").astype(np.int32))
        self.register_buffer("permutation", permutation, persistent=False)
        self.register_buffer("normal", _normal(length, *seed, 2), persistent=False)

    def change(self, like: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """scale * P z as a matrix (out, in)."""
        (subspace,), size, normal = self._subspace, self.shape[0] * self.shape[1], self.normal.to(like)
        start = nn.functional.pad(self.signs.to(like) * subspace.z.to(like), (0, len(normal) - len(self.signs)))
        mixed = hadamard(normal * hadamard(start).index_select(0, self.permutation))[:size]
        length = (size * normal.double().square().sum()).sqrt().to(like)
        return (self.scale.to(like) / length * mixed).view(self.shape)


@dataclass(frozen=True)
class SAID(Method):
    """Moves all target weights in one random subspace: W_l + s_l P_l z with one trained z for the whole tower.

    The structure-aware form: a trained scale s_l, 1 at the start, for each weight besides z, which is zero, so that
    nothing changes at the start. Every P_l is a Fastfood projection, H diag(g) Pi H diag(b) padded to a power of two
    and scaled so that |P_l z| is |z| on average. Signs, permutation and normal numbers (sums of twelve uniform ones)
    follow from the seed bit by bit on every machine, so that a saved adapter holds z and the scales alone; in memory
    they take 8 bytes for each of the padded weights, 200 MB for q and v of ViT-B/16, and every forward makes the
    changes whole. It is an instrument to ask how few numbers a task needs more than a way to train a model. Published
    code draws the projections without a seed of their own, and one copy of it scales the backward pass of the transform
    but not the forward pass, so that the gradient of z is 1/n of the right one; here it is right. Mergeable.
    Trainable: `dimension`, one of them for each target layer and the rest in z.
    Source: Aghajanyan, Gupta, Zettlemoyer, Intrinsic Dimensionality Explains the Effectiveness of Language Model
    Fine-Tuning, 2021; Le, Sarlos, Smola, Fastfood, 2013. The default of 1,000 dimensions is this library's.

    Args:
        dimension: number of trained values in each tower.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        seed: seed of the projections.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    dimension: int = 1000
    targets: tuple[str, ...] = ("q", "v")
    seed: int = 0
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.dimension > 0, self, "dimension must be a positive integer")
        require(self.seed >= 0, self, "seed must be an integer that is not negative")
        require_targets(self)

    def place(self, tower: Tower) -> Iterator[Placement | Shared]:
        """The coordinates, and one `Fastfood` at every target layer of the chosen blocks."""
        layers = target_layers(self, tower)
        number = self.dimension - len(layers)
        require(number > 0, self, f"a dimension of {self.dimension} leaves nothing for z beside {len(layers)} scales")
        smallest = min(hadamard_length(layer.matrix.numel()) for _, layer in layers)
        require(number <= smallest, self, f"z has {number} numbers, more than the {smallest} of the smallest weight")
        subspace = Subspace(number)
        yield Shared(tower.name, "subspace", subspace)
        for place, (index, layer) in enumerate(layers):
            module = Fastfood(subspace, *layer.matrix.shape, (self.seed, place))
            yield Placement(tower.name, index, layer.site, module)


def hadamard_length(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The Walsh-Hadamard transform, without a factor, of a vector whose length is a power of two."""
    length, half = len(x), 1
    while half < length:
        left, right = x.view(-1, 2, half).unbind(1)
        x = torch.stack((left + right, left - right), dim=1).view(length)
        half *= 2
    return x


def _signs(count: int, *seed: int) -> torch.Tensor:
    """Random ones and minus ones."""
    return torch.from_numpy((raw_numbers(count, *seed) >> np.uint64(63)).astype(np.float32) * 2 - 1)


def _normal(count: int, *seed: int) -> torch.Tensor:
    """Sums of twelve uniform numbers of 16 bits, less their mean: normal but for the tails, and exact everywhere."""
    sums = raw_numbers(3 * count, *seed).view(np.uint16).reshape(count, 12).sum(1, dtype=np.int64)
    return torch.from_numpy(((2 * sums - 12 * 65535) / 2**17).astype(np.float32))
