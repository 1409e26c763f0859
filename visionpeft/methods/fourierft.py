"""FourierFT: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform (Gao et al., 2024).

https://arxiv.org/abs/2405.03003
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn as nn

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.seeded import places
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.methods.parts.weight_change import WeightChange
from visionpeft.sites import Placement


class SparseSpectrum(WeightChange):
    """y + scale * T(F) x with a linear transform T of F (out, in), zero but for trained coefficients (number,).

    Their places follow from seed and shape, and are not saved.
    """

    def __init__(self, layer: Layer, number: int, scale: float, seed: int, std: float):
        super().__init__()
        self.shape = layer.out_features, layer.in_features
        self.coefficients = nn.Parameter(torch.randn(number) * std if std else torch.zeros(number))
        self.scale = scale
        self.register_buffer("places", places(*self.shape, number, seed).clone(), persistent=False)

    def spectrum(self, like: torch.Tensor) -> torch.Tensor:
        """F (out, in)."""
        coefficients = self.coefficients.to(like)
        flat = coefficients.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_copy(0, self.places.to(like.device), coefficients).view(self.shape)


class FourierChange(SparseSpectrum):
    """`SparseSpectrum` whose transform is the real part of the inverse discrete Fourier transform of both sides."""

    def change(self, like: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """scale * Re(IDFT(F)) (out, in)."""
        spectrum = self.spectrum(like)
        exact = spectrum if spectrum.dtype == torch.float64 else spectrum.float()  # of halves there is no transform
        return self.scale * torch.fft.ifft2(exact).real.to(spectrum.dtype)


def require_spectrum(method: Method) -> None:
    """Refuse fields of a method with a sparse spectrum that make none."""
    require(method.number > 0, method, "number must be a positive integer")
    require(method.seed >= 0, method, "seed must be an integer that is not negative")
    require_targets(method)


def layers_with_room(method: Method, tower: Tower) -> Iterator[tuple[int | None, Layer]]:
    """The target layers of a method with a sparse spectrum, each of which has that many entries."""
    for index, layer in target_layers(method, tower):
        most, number = layer.out_features * layer.in_features, method.number
        require(number <= most, method, f"{layer.target} has {most} entries, so number cannot be {number}")
        yield index, layer


@dataclass(frozen=True)
class FourierFT(Method):
    """Change of weights by a few frequencies: W + scale * Re(IDFT(F)), F zero but for trained coefficients.

    The places of the coefficients are drawn once from seed and shape, the same for all layers of one shape and on every
    machine, so that a saved adapter holds the coefficients alone. They start N(0, 1), so that the model is changed from
    the beginning, as published; "zero" starts at the backbone. Only the real part acts, so that a coefficient and the
    one of the mirrored frequency do the same. The change is formed whole in every step: slower than LoRA. Acts on the
    rows of q, k and v separately. Mergeable. Files are not exchanged with peft: its places are a permutation by
    PyTorch's generator, whose stream no version promises, and of a fused qkv they cross the borders of q, k and v.
    Trainable: number for each target layer; 72,000 on ViT-B/16 for 3000 on q and v.
    Source: Gao et al., Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, 2024; scale as in peft, that it
    has 3000 on ViT-B is recalled, not read.

    Args:
        number: trained coefficients of a layer.
        scale: factor of the change.
        init: "normal" for N(0, 1), or "zero".
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        seed: seed of the places.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    number: int = 3000
    scale: float = 150.0
    init: Literal["normal", "zero"] = "normal"
    targets: tuple[str, ...] = ("q", "v")
    seed: int = 777
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require_spectrum(self)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `FourierChange` at every target layer of the chosen blocks."""
        std = 1.0 if self.init == "normal" else 0.0
        for index, layer in layers_with_room(self, tower):
            module = FourierChange(layer, self.number, self.scale, self.seed, std)
            yield Placement(tower.name, index, layer.site, module)
