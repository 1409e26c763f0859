"""Gradient-based Parameter Selection for Efficient Fine-Tuning (Zhang et al., 2024), https://arxiv.org/abs/2312.10136."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require
from visionpeft.methods.parts.entries import TrainsEntries, highest_of_rows
from visionpeft.methods.parts.measures import Batch, Measures
from visionpeft.methods.parts.sparse_delta import SparseCandidate, candidates_of

TEMPERATURE = 0.07


@dataclass(frozen=True)
class GPS(TrainsEntries):
    """Trains of every neuron the weights with the largest gradient: for each row of each matrix k inputs, and its bias.

    The score of a weight is |sum over batches of d loss / d w|, measured by `visionpeft.allocate` on the training data
    before training (the command line does it by itself) with dropout acting, as in the authors' code. The loss is the
    supervised contrastive one, whatever loss `allocate` is given: with unit features z of two views of every image,
    the mean over views i of the mean over other views p of i's class of -log(exp(z_i z_p / 0.07) / sum_{a != i}
    exp(z_i z_a / 0.07)). So no head is needed. Batches are (first views, second views, labels), or (images, labels)
    where both views are the image as it is loaded, as they are in the authors' code without augmentation (VTAB-1k);
    so it is under `visionpeft.fit`. The weight becomes W + D with k trained entries in every row of D, zero at the
    start; the rows of q, k and v are neurons of their own. Acts on q k v proj fc1 fc2 and the patch convolution; norms,
    class token and positions are frozen. As in the authors' code, and not in the paper's words, all biases of these
    layers are trained, too; the key bias is among them, although its gradient is zero unless keys are rotated or
    normalised. Their code forms dense gradients and moments, this one the chosen entries alone. Mergeable. The saved
    adapter holds values and indices.
    Trainable: (k + 1) times the rows, (k + 1) (L 9 D + D) with an MLP of width 4 D; 167,424 on ViT-B/16 for k = 1,
    half of it without biases.
    Source: Zhang et al., Gradient-based Parameter Selection for Efficient Fine-Tuning, 2024, and the authors' code.

    Args:
        per_row: trained weights k of each row; the paper uses 1 on VTAB-1k and up to 15 on fine-grained sets.
        biases: whether the biases of these layers are trained, too.
        loss: "contrastive", or "training" for the loss of the task, for models without labels or pooled features.
        samples: how many samples are measured, in the batches they come in; None for all.
        entries: how many entries of each tensor; found by `allocate`, not to be given.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices; the patch convolution is changed
            with all blocks only.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    choosing = ("per_row", "biases", "loss", "samples", "entries")

    per_row: int = 1
    biases: bool = True
    loss: Literal["contrastive", "training"] = "contrastive"
    samples: int | None = None
    entries: dict[str, int] | None = None
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.per_row > 0, self, "per_row must be a positive integer")
        require(self.samples is None or self.samples > 0, self, "samples must be a positive integer, or None for all")

    @property
    def pending(self) -> bool:
        """Whether the gradients have not been measured."""
        return self.entries is None

    def candidates(self, tower: Tower) -> dict[str, SparseCandidate]:
        """Weights and biases of the linear layers of the blocks and of the patch convolution."""
        blocks = blocks_of(self, tower)
        outside = "all" if len(blocks) == tower.depth else "none"
        return candidates_of(tower, blocks, norms=False, outside=outside, key_bias=True)

    def allocate(self, towers: Sequence[Tower], measures: Measures) -> tuple[Method, dict[str, torch.Tensor]]:
        """Choose the entries with the largest sums of gradients of every row."""
        candidates = {name: each for tower in towers for name, each in self.candidates(tower).items()}
        weights = {name: each for name, each in candidates.items() if each.part == "weight"}
        for name, candidate in weights.items():
            columns = candidate.values[0].numel()
            require(self.per_row <= columns, self, f"rows of {name} have {columns} entries, not {self.per_row}")

        def contrastive(model: nn.Module, batch: Batch) -> torch.Tensor:
            *views, labels = batch
            classes = labels.ndim == 1 and not labels.is_floating_point()
            require(classes, self, 'the contrastive loss needs one class for each image; use loss="training"')
            views = views if len(views) == 2 else [*views, *views]
            return supervised_contrastive(measures.features(model, torch.cat(views)), labels.repeat(2))

        loss = contrastive if self.loss == "contrastive" else None
        gradients = measures.gradients(weights, self.samples, loss, training=True)
        indices = {}
        for name, candidate in candidates.items():
            if name in weights:
                indices[name] = highest_of_rows(gradients[name].abs(), self.per_row)
            elif self.biases:
                indices[name] = torch.arange(candidate.values.numel(), dtype=torch.int32)
        return self.with_entries(indices)


def supervised_contrastive(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The supervised contrastive loss of features (views, width) with classes (views,), each of which has another view.

    Source: Khosla et al., Supervised Contrastive Learning, 2020.
    """
    unit = F.normalize(features.float() if features.dtype != torch.float64 else features, dim=1)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    scores = (unit @ unit.T / TEMPERATURE).masked_fill(itself, -torch.inf)
    log_shares = (scores - scores.logsumexp(1, keepdim=True)).masked_fill(itself, 0.0)
    positive = (labels[:, None] == labels) & ~itself
    return -((log_shares * positive).sum(1) / positive.sum(1)).mean()
