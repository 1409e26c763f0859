"""VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks (Li et al., 2024), https://arxiv.org/abs/2405.15179."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.lora import LowRank
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.sites import Placement, Shared


class VectorBank(nn.Module):
    """The vectors (number, length) that all layers are made of, uniform in +-0.02."""

    def __init__(self, number: int, length: int):
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(number, length).uniform_(-0.02, 0.02))


class FromBank(LowRank):
    """`LowRank` with factors put together from pieces, each a mixture of the `top` vectors of highest logit.

    down_logits (rank, in / length, number) and up_logits (out / length, rank, number) are N(0, 0.1): with a bank that
    is not zero, the model is changed from the start.
    """

    def __init__(self, bank: VectorBank, in_features: int, out_features: int, rank: int, top: int, dropout: float):
        nn.Module.__init__(self)  # A and B are no parameters here
        number, length = bank.vectors.shape
        self.down_logits = nn.Parameter(torch.randn(rank, in_features // length, number) * 0.1)
        self.up_logits = nn.Parameter(torch.randn(out_features // length, rank, number) * 0.1)
        self.top = top
        self.scaling = 1.0
        self.dropout = nn.Dropout(dropout)
        self._bank = (bank,)  # in a tuple, because the adapter owns it once for all layers

    def mixed(self, logits: torch.Tensor) -> torch.Tensor:
        """Mixtures (..., length) of the vectors by logits (..., number): softmax over the highest."""
        (bank,) = self._bank
        values, chosen = logits.topk(self.top, dim=-1)
        return (values.softmax(-1)[..., None] * bank.vectors.to(logits)[chosen]).sum(-2)

    @property
    def A(self) -> torch.Tensor:
        """The pieces of each row, one after another (rank, in)."""
        return self.mixed(self.down_logits).flatten(-2)

    @property
    def B(self) -> torch.Tensor:
        """The pieces of each column, one below the other (out, rank)."""
        return self.mixed(self.up_logits).transpose(-1, -2).flatten(0, 1)


@dataclass(frozen=True)
class VBLoRA(Method):
    """LoRA whose A and B are put together from one bank of short vectors for all layers: W + B A.

    Every row of A and column of B is cut into pieces of `length` features, each the softmax mixture of the `top`
    vectors of highest logit. What must be stored after training is the bank, and of each piece `top` numbers of vectors
    and their weights; here the file holds the logits, so that training can go on from it, and `export_peft` writes
    LoRA. Only the chosen logits and vectors get gradients in a step. As published it does not start at the backbone.
    Acts on the rows of q, k and v separately. Mergeable.
    Trainable: number * length, and for every target layer rank * number * (in + out) / length; 212,992 on ViT-B/16 for
    rank 4 and 256 vectors of 256 on q and v.
    Source: Li et al., VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks, 2024; starts and defaults as
    in peft.

    Args:
        rank: rank r of the change.
        number: vectors in the bank.
        length: features of a vector, which divides the widths of every target.
        top: vectors in a mixture.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        dropout: dropout on the input of A.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both, each with its own bank; by default the image tower.
    """

    needs_blocks: ClassVar = False
    rank: int = 4
    number: int = 256
    length: int = 256
    top: int = 2
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("rank", "number", "length"):
            require(getattr(self, name) > 0, self, f"{name} must be a positive integer")
        require(1 < self.top <= self.number, self, f"top must be from 2 to number, {self.number}, not {self.top}")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        require_targets(self)

    def place(self, tower: Tower) -> Iterator[Placement | Shared]:
        """The bank, and one `FromBank` at every target layer of the chosen blocks."""
        bank = VectorBank(self.number, self.length)
        yield Shared(tower.name, "bank", bank)
        for index, layer in target_layers(self, tower):
            widths = layer.in_features, layer.out_features
            fits = not any(width % self.length for width in widths)
            sentence = f"{layer.target} maps {widths[0]} to {widths[1]} features, which a length of {self.length} "
            require(fits, self, sentence + "does not divide")
            module = FromBank(bank, *widths, self.rank, self.top, self.dropout)
            yield Placement(tower.name, index, layer.site, module)
