"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation (Wang et al., 2024), https://arxiv.org/abs/2407.05000."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.quantised import is_quantised
from visionpeft.backbones.tower import Tower
from visionpeft.errors import UnsupportedError
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.measures import Measures, Place
from visionpeft.methods.parts.sparse_delta import SparseCandidate
from visionpeft.methods.parts.targets import ranked_layers
from visionpeft.methods.pissa import Counting


@dataclass(frozen=True)
class LoRAGA(Counting):
    """LoRA that starts along the gradient: W + s (B A - B0 A0), whose first step is near that of full fine-tuning.

    Of the gradient G = U S V^T of the loss in the weight, summed over batches, A0 = c V_r^T are the first r right
    singular vectors and B0 = c U_{r+1..2r} the next r left ones, c = out^(1/4) / sqrt(gamma) (the form "ArB2r" with
    the scale "stable"); B and A start there, so that nothing changes at the start, to the bit. The left and right
    vectors belong to different singular values, so that B0 A0 is orthogonal to G. `visionpeft.allocate` measures G
    before training (the command line does it by itself); the head must not start at zero. As in `PiSSA`, the backbone
    is never written, where published code writes W - s B0 A0 into it, and `save` writes the change as `LoRA` of twice
    the rank. q, k and v have gradients of their own. Mergeable.
    peft reads that LoRA after `export_peft`; what peft itself started so cannot be read, because its file holds B and
    A without the B0 A0 that was taken out of the backbone. Besides, peft multiplies B0 by the singular values and
    scales it alone, where the authors' code scales both orthonormal factors: that is another start, which grows with
    the loss (findings/peft_lora_ga_start_grows_with_the_loss.sh).
    Trainable: sum over target layers of rank * (in + out), as LoRA; 294,912 on ViT-B/16 for rank 8 on q and v.
    Source: Wang, Yu, Li, LoRA-GA: Low-Rank Adaptation with Gradient Approximation, 2024, and the authors' code.

    Args:
        rank: rank r of the change.
        alpha: numerator of the scale s = alpha / rank; None for a scale of 1.
        gamma: the larger, the smaller the start; 16 in the authors' code.
        samples: how many samples are measured, in the batches they come in; None for all.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        dropout: dropout on the input of the change, what is counted from included.
        overrides: other ranks for some blocks or targets, such as {"fc1": 4, "last:4": 16, "first:2/q": 2}.
        measured: whether the gradients have been measured; found by `allocate`, not to be given.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    found: ClassVar[tuple[str, ...]] = ("measured",)

    rank: int = 8
    alpha: float | None = None
    gamma: float = 16.0
    samples: int | None = 128
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    overrides: dict[str, int] = field(default_factory=dict)
    measured: bool | None = None
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.gamma > 0, self, f"gamma must be positive, not {self.gamma}")
        require(self.samples is None or self.samples > 0, self, "samples must be a positive integer, or None for all")

    @property
    def pending(self) -> bool:
        """Whether the gradients have not been measured."""
        return not self.measured

    def start(self, layer: Layer, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for the factors; what they are comes from `allocate`, or with what was saved."""
        weight = layer.matrix
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return weight.new_zeros(len(weight), rank, dtype=dtype), weight.new_zeros(rank, weight.shape[1], dtype=dtype)

    def allocate(self, towers: Sequence[Tower], measures: Measures) -> tuple[Method, dict[str, torch.Tensor]]:
        """Let the factors start as singular vectors of the gradients."""
        layers = {
            Place(tower.name, index, layer.site).path: (index, layer, rank)
            for tower in towers
            for index, layer, rank, _ in ranked_layers(self, tower)
        }
        for path, (_, layer, rank) in layers.items():
            if is_quantised(layer.matrix):
                raise UnsupportedError(f"LoRAGA: the weight of {path} is quantised and has no gradient to start from")
            most = min(layer.matrix.shape) // 2
            require(rank <= most, self, f"{layer.target} has {2 * most} components, so its rank cannot be {rank}")
        candidates = {path: SparseCandidate(index, layer, "weight") for path, (index, layer, _) in layers.items()}
        gradients, tensors = measures.gradients(candidates, self.samples), {}
        for path, (_, layer, rank) in layers.items():
            left, _, right = torch.linalg.svd(gradients[path], full_matrices=False)
            size = layer.out_features**0.25 / self.gamma**0.5
            start = {"U": size * left[:, rank : 2 * rank], "V": size * right[:rank]}
            tensors |= {f"{path}.{name}": tensor for name, tensor in start.items()}
            tensors |= {f"{path}.{name}_start": tensor for name, tensor in start.items()}
        return dataclasses.replace(self, measured=True), tensors
