"""WaveFT: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets (Bilican et al., 2025).

https://arxiv.org/abs/2505.12532
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from visionpeft.backbones.tower import Tower
from visionpeft.methods.fourierft import SparseSpectrum, layers_with_room, require_spectrum
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require
from visionpeft.sites import Placement


class WaveletChange(SparseSpectrum):
    """`SparseSpectrum` whose transform is one level of the inverse Haar wavelet of both sides.

    The quarters of F are the coarse part (above left) and what differs between columns, rows and both.
    """

    def change(self, like: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """scale * inverse Haar(F) (out, in)."""
        return self.scale * inverse_haar(inverse_haar(self.spectrum(like)).t()).t()


def inverse_haar(coefficients: torch.Tensor) -> torch.Tensor:
    """Rows 2 i and 2 i + 1 are (c_i + d_i) / sqrt(2) and (c_i - d_i) / sqrt(2), c and d the halves of the rows."""
    coarse, detail = coefficients.chunk(2)
    return torch.stack((coarse + detail, coarse - detail), dim=1).flatten(0, 1) * 0.5**0.5


@dataclass(frozen=True)
class WaveFT(Method):
    """Change of weights by a few wavelets: W + scale * IDWT(F), F zero but for trained coefficients.

    One level of the Haar wavelet (db1): a coefficient changes a patch of 2 x 2 entries of the weight, where one of
    `FourierFT` changes all of them. The places are drawn once from seed and shape, so that a saved adapter holds the
    coefficients alone; they start at zero: no change. The change is formed whole in every step: slower than LoRA. Acts
    on the rows of q, k and v separately. Mergeable. Files are not exchanged with peft, for the reasons of `FourierFT`.
    Trainable: number for each target layer; 62,208 on ViT-B/16 for 2592 on q and v.
    Source: Bilican et al., Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets, 2025; defaults as in
    peft. The paper was not read.

    Args:
        number: trained coefficients of a layer.
        scale: factor of the change.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        seed: seed of the places.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    number: int = 2592
    scale: float = 25.0
    targets: tuple[str, ...] = ("q", "v")
    seed: int = 777
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require_spectrum(self)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `WaveletChange` at every target layer of the chosen blocks."""
        for index, layer in layers_with_room(self, tower):
            widths = layer.in_features, layer.out_features
            sentence = f"{layer.target} maps {widths[0]} to {widths[1]} features, but wavelets need even numbers"
            require(not any(width % 2 for width in widths), self, sentence)
            module = WaveletChange(layer, self.number, self.scale, self.seed, std=0.0)
            yield Placement(tower.name, index, layer.site, module)
