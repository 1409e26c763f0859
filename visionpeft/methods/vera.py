"""VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al., 2024), https://arxiv.org/abs/2310.11454."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require, to_parameter_dtype
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.sites import Order, Placement, Shared


class RandomMatrices(nn.Module):
    """Frozen matrices A (rank, in) for each input width and B (out, rank) for each output width.

    They are functions of seed, letter and shape, Kaiming-uniform over their columns, and are not saved.
    """

    def __init__(self, rank: int, in_features: set[int], out_features: set[int], seed: int):
        super().__init__()
        for width in sorted(in_features):
            self.register_buffer(f"A_{width}", random_matrix(rank, width, seed, 0), persistent=False)
        for width in sorted(out_features):
            self.register_buffer(f"B_{width}", random_matrix(width, rank, seed, 1), persistent=False)


def random_matrix(rows: int, columns: int, seed: int, letter: int) -> torch.Tensor:
    """A float32 matrix (rows, columns), uniform in +-sqrt(6 / columns), the same on every machine and version.

    `letter`, 0 for A and 1 for B, makes them two draws where rank and width are the same, too.
    The upper 24 bits of each number of PCG64, whose stream NumPy guarantees, make one value.
    """
    raw = np.random.PCG64(np.random.SeedSequence((seed, rows, columns, letter))).random_raw(rows * columns)
    unit = (raw >> np.uint64(40)).astype(np.float64) / 2**24
    values = (2 * unit - 1) * math.sqrt(6 / columns)
    return torch.from_numpy(values.astype(np.float32)).view(rows, columns)


class ScaledRandom(nn.Module):
    """y + b * (B (d * (A dropout(x)))) with frozen A and B; d (rank,) starts at `initial`, b (out,) at zero."""

    stackable = True
    order = Order.WEIGHT
    output_side = ("b",)

    def __init__(self, matrices: RandomMatrices, in_features: int, out_features: int, initial: float, dropout: float):
        super().__init__()
        self.names = f"A_{in_features}", f"B_{out_features}"
        self._matrices = (matrices,)  # in a tuple, because the adapter owns it once for all layers
        rank = len(getattr(matrices, self.names[0]))
        self.d = nn.Parameter(torch.full((rank,), float(initial)))
        self.b = nn.Parameter(torch.zeros(out_features))
        self.dropout = nn.Dropout(dropout)

    @property
    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, in) and B (out, rank)."""
        return tuple(getattr(self._matrices[0], name) for name in self.names)

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (..., in) and output y (..., out) of the layer to the changed output (..., out)."""
        A, B = (matrix.to(self.d) for matrix in self.matrices)  # FSDP casts parameters and leaves buffers as they are
        z = self.d * F.linear(self.dropout(to_parameter_dtype(x, self.d)), A)
        return y + (self.b * F.linear(z, B)).to(y.dtype)

    def merge(self, weight: torch.Tensor, bias):
        """Weight and bias that compute the same: W + diag(b) B diag(d) A."""
        A, B, d, b = (tensor.to(weight) for tensor in (*self.matrices, self.d, self.b))
        return weight + b[:, None] * (B @ (d[:, None] * A)), bias


@dataclass(frozen=True)
class VeRA(Method):
    """Change of weights by two trained vectors: W + diag(b) B diag(d) A with random A and B that stay frozen.

    All target layers of one input width share A (rank, in), all of one output width share B (out, rank). Both are
    Kaiming-uniform and follow from the seed bit by bit on every machine, so that a saved adapter holds the vectors
    alone: 96 KiB on ViT-B/16, where A and B take 1.5 MiB of memory. d starts at `initial`, b at zero: no change at the
    start. Mergeable. Trainable: sum over target layers of rank + out; 24,576 on ViT-B/16 for rank 256 on q and v.
    Where target layers differ in width, published code cuts one A and one B of the largest widths to each layer, so
    that the entries of smaller ones are as small as those of the largest; here each width has matrices of its own
    bound.
    Source: Kopiczko et al., VeRA: Vector-based Random Matrix Adaptation, 2024.

    Args:
        rank: rank r of the change; the vectors are so small that it may be large.
        initial: initial value of d.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        dropout: dropout on the input of A.
        seed: seed of A and B.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    rank: int = 256
    initial: float = 0.1
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    seed: int = 0
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.rank > 0, self, "rank must be a positive integer")
        require(self.initial != 0, self, "initial must not be 0, or neither vector would ever have a gradient")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        require(self.seed >= 0, self, "seed must be an integer that is not negative")
        require_targets(self)

    def place(self, tower: Tower) -> Iterator[Placement | Shared]:
        """The random matrices, and one `ScaledRandom` at every target layer of the chosen blocks."""
        layers = target_layers(self, tower)
        widths = ({layer.in_features for _, layer in layers}, {layer.out_features for _, layer in layers})
        matrices = RandomMatrices(self.rank, *widths, self.seed)
        yield Shared(tower.name, "matrices", matrices)
        for index, layer in layers:
            module = ScaledRandom(matrices, layer.in_features, layer.out_features, self.initial, self.dropout)
            yield Placement(tower.name, index, layer.site, module)
