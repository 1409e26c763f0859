"""On the Effectiveness of Parameter-Efficient Fine-Tuning (Fu et al., 2023), https://arxiv.org/abs/2211.15583."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require
from visionpeft.methods.parts.entries import TrainsEntries
from visionpeft.methods.parts.measures import Measures
from visionpeft.methods.parts.sparse_delta import SparseCandidate, candidates_of, highest


@dataclass(frozen=True)
class SecondOrder(TrainsEntries):
    """Trains the entries with the largest mean gradient, a share of every tensor by itself ("SAM" in its paper).

    The paper's second-order approximation method: to second order, with a Hessian that is a multiple of the identity,
    the loss falls most where the square of the mean gradient is largest, so an entry's score is |sum over batches of
    d loss / d w|. An entry whose gradients change their sign from batch to batch scores nothing here and much in
    `FishMask`, which squares before it adds. The gradients are those of the training loss, measured by
    `visionpeft.allocate` before training (the command line does it by itself) with dropout acting, as in the authors'
    code; nothing is trained meanwhile. Of each weight, bias and norm of the blocks and of the final norm,
    floor(density * size) entries are chosen, of q, k and v apart, and without the key bias, which has no gradient
    unless keys are rotated or normalised. The head is trained whole and must not start at zero. Mergeable. The saved
    adapter holds values and indices. The name keeps it apart from sharpness-aware minimisation and Segment Anything.
    Trainable: sum over tensors of floor(density * size); 425,130 on ViT-B/16 for 0.5 %.
    Source: Fu, Yang, So, Lam, Bing, Collier, On the Effectiveness of Parameter-Efficient Fine-Tuning, 2023, and the
    authors' code: 600 batches of 16.

    Args:
        density: share of the entries of every tensor that is trained.
        samples: how many samples are measured, in the batches they come in.
        entries: how many entries of each tensor; found by `allocate`, not to be given.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    choosing = ("density", "samples", "entries")

    density: float = 0.005
    samples: int = 9600
    entries: dict[str, int] | None = None
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.density <= 1, self, f"density must be above 0 and at most 1, not {self.density}")
        require(self.samples > 0, self, "samples must be a positive integer")

    @property
    def pending(self) -> bool:
        """Whether the gradients have not been measured."""
        return self.entries is None

    def candidates(self, tower: Tower) -> dict[str, SparseCandidate]:
        """Weights, biases and norms of the blocks, and the final norm."""
        return candidates_of(tower, blocks_of(self, tower), norms=True)

    def allocate(self, towers: Sequence[Tower], measures: Measures) -> tuple[Method, dict[str, torch.Tensor]]:
        """Choose the entries with the largest sums of gradients, of every tensor by itself."""
        candidates = {name: each for tower in towers for name, each in self.candidates(tower).items()}
        numbers = {name: int(self.density * each.values.numel()) for name, each in candidates.items()}
        require(any(numbers.values()), self, f"a density of {self.density} is less than one entry of every tensor")
        gradients = measures.gradients(candidates, self.samples, training=True)
        indices = {}
        for name, number in numbers.items():
            if number:
                indices |= highest({name: gradients[name].abs()}, number)
        return self.with_entries(indices)
