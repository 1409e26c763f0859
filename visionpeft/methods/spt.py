"""Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning (He et al., 2023), https://arxiv.org/abs/2303.08566."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Tower
from visionpeft.methods.lora import concatenated, low_rank_at
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require, require_same, to_parameter_dtype
from visionpeft.methods.parts.measures import Squares
from visionpeft.methods.parts.sparse_delta import (
    SparseCandidate,
    candidates_of,
    index_tensors,
    indices_by_name,
    sparse_placements,
    united,
)
from visionpeft.sites import Order, Placement

# what need not be the same in adapters that are combined
FOUND = ("budget", "rank", "dropout", "matrix_share", "vector_share", "samples", "entries", "structured")
CLASS_TOKENS = ("cls_token", "class_embedding")


class OutputBottleneck(nn.Module):
    """y + up(gelu(down(dropout(z)))) with z = y, or for the attention's projection z = x, the layer's input.

    The weight of down (rank, width) is Kaiming-uniform with a = sqrt(5), its bias PyTorch's; up (out, rank) is zero.
    """

    stackable = True
    order = Order.OUTPUT

    def __init__(self, layer: Layer, rank: int, dropout: float):
        super().__init__()
        self.parallel = layer.site == "proj"
        self.channels_first = layer.channels_first
        self.down = nn.Linear(layer.in_features if self.parallel else layer.out_features, rank)
        self.up = nn.Linear(rank, layer.out_features)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (..., in) and output y (..., out) of the layer to the changed output (..., out).

        Of a convolution, y is (batch, out, h, w), and every position is changed by itself.
        """
        z = to_parameter_dtype(x if self.parallel else y, self.down.weight)
        z = z.movedim(1, -1) if self.channels_first else z
        change = self.up(nn.functional.gelu(self.down(self.dropout(z)))).to(y.dtype)
        return y + (change.movedim(-1, 1) if self.channels_first else change)


@dataclass(frozen=True)
class SPT(Method):
    """Spends a budget of trained values where the task is most sensitive: matrices as a whole, or single entries.

    The sensitivity of an entry is the sum over batches of its squared gradient, measured by `visionpeft.allocate` on
    the backbone with its fresh head before training (the command line does it by itself). Of the entries above one
    threshold, a matrix that holds at least `matrix_share` times the size of a low-rank change gets that change
    (LoRA, W + B A, or a bottleneck on its output); the entries of other matrices, and of depth-wise convolutions, are
    trained by themselves, W + D. Of a bias or norm, all entries are trained if `vector_share` of them are above, else
    those alone. The threshold is the lowest within the budget. The class token is trained, too; embeddings are not. The
    head must not start at zero.
    Mergeable with `structure="lora"`. Where the published code redraws its zero-initialised matrices, this does not.
    It measures in training mode, with drop path 0.1 in batches of 64; this in evaluation mode, in the batches it is
    given. The structured matrices were the same at ten budgets.
    Trainable: at most `budget` and the class token.
    Source: He, Cai, Zhang, Tao, Zhuang, Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning, 2023.

    Args:
        budget: trained values, without head and class token; the paper uses 200,000 to 1,000,000 on ViT-B/16.
        structure: what a sensitive matrix gets, "lora" or "adapter".
        rank: rank of the change, or width of the bottleneck.
        dropout: dropout on its input.
        matrix_share: sensitive entries, as a share of the values of its change, that make a matrix structured.
        vector_share: sensitive entries, as a share of its own, that make a bias or norm trained whole.
        samples: how many samples are measured, in the batches they come in.
        class_token: whether the class token is trained where there is one.
        entries: how many single entries of each tensor; found by `allocate`, not to be given.
        structured: names of the structured matrices; found by `allocate`, not to be given.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    budget: int = 400_000
    structure: Literal["lora", "adapter"] = "lora"
    rank: int = 8
    dropout: float = 0.0
    matrix_share: float = 0.1
    vector_share: float = 0.2
    samples: int = 512
    class_token: bool = True
    entries: dict[str, int] | None = None
    structured: list[str] | None = None
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("budget", "rank", "samples"):
            value = getattr(self, name)
            require(value > 0, self, f"{name} must be a positive integer, not {value!r}")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        shares = (self.matrix_share, self.vector_share)
        require(all(0 < share <= 1 for share in shares), self, "matrix_share and vector_share must be in (0, 1]")

    @property
    def pending(self) -> bool:
        """Whether the sensitivities have not been measured."""
        return self.entries is None

    def trains(self, tower: Tower) -> Iterator[str]:
        """The class token."""
        for name in tower.parameter_names() if self.class_token else ():
            if name.rpartition(".")[2] in CLASS_TOKENS:
                yield name

    def place(self, tower: Tower) -> Iterator[Placement]:
        """A `LowRank` or `OutputBottleneck` at structured matrices, a `SparseDelta` at layers with single entries."""
        candidates = candidates_of(tower, blocks_of(self, tower), norms=True)
        named = set(self.structured or ())
        for name, candidate in candidates.items():
            if name in named:
                layer = candidate.layer
                if self.structure == "lora":
                    module = low_rank_at(layer, self.rank, 1.0, self.dropout)
                else:
                    module = OutputBottleneck(layer, self.rank, self.dropout)
                yield Placement(tower.name, candidate.block, layer.site, module, name=f"{layer.site}_{self.structure}")
        yield from sparse_placements(tower, candidates, indices_by_name(candidates, self.entries))

    def combine(self, methods, parts, weights):
        """The weighted sum of the changes, with the structured matrices and the entries of all."""
        require_same(methods, but=FOUND)
        require(self.structure == "lora", self, "bottlenecks of structure='adapter' cannot be combined")
        rank, low_rank = concatenated(parts, weights, [lambda rank: 1.0] * len(parts))
        entries, sparse = united(parts, weights)
        structured = list(dict.fromkeys(name for method in methods for name in method.structured))
        changed = {"rank": rank or self.rank, "entries": entries, "structured": structured}
        return dataclasses.replace(self, **changed), low_rank | sparse

    def allocate(self, towers: Sequence[Tower], squares: Squares) -> tuple[Method, dict[str, torch.Tensor]]:
        """Lower the threshold on the sensitivities as far as the budget allows."""
        candidates = {}
        for tower in towers:
            candidates |= candidates_of(tower, blocks_of(self, tower), norms=True)
        scores = squares(candidates, self.samples, False)
        above, below = max(score.max().item() for score in scores.values()) * 2, torch.finfo(torch.float32).tiny
        counted = scores
        for _ in range(40):  # halving the interval of exponents until float32 values cannot tell its ends apart
            middle = math.sqrt(above) * math.sqrt(below)
            if self._cost(candidates, _counts(counted, middle)) > self.budget:
                below = middle
                counted = {name: score[score >= below] for name, score in counted.items()}  # soon a few of them
            else:
                above = middle
        counts = _counts(scores, above)
        structured = [name for name, n in counts.items() if self._is_structured(candidates[name], n)]
        indices = {}
        for name, number in counts.items():
            whole = self._is_whole(candidates[name], number)
            if name not in structured and number:
                chosen = torch.ones_like(scores[name], dtype=torch.bool) if whole else scores[name] >= above
                indices[name] = chosen.flatten().nonzero().flatten().to(torch.int32)
        require(bool(structured or indices), self, f"a budget of {self.budget} is less than any change costs")
        entries = {name: len(index) for name, index in indices.items()}
        return dataclasses.replace(self, entries=entries, structured=structured), index_tensors(indices)

    def _cost(self, candidates: Mapping[str, SparseCandidate], counts: Mapping[str, int]) -> int:
        """Trained values if so many entries of each tensor are sensitive."""
        return sum(self._cost_of(candidates[name], number) for name, number in counts.items())

    def _cost_of(self, candidate: SparseCandidate, number: int) -> int:
        if self._is_structured(candidate, number):
            return self._structured_size(candidate.layer)
        return candidate.values.numel() if self._is_whole(candidate, number) else number

    def _is_structured(self, candidate: SparseCandidate, number: int) -> bool:
        # A convolution of single channels has no matrix of them that could have a rank.
        matrix = candidate.values.ndim == 2 or (candidate.values.ndim > 2 and candidate.layer.owner.groups == 1)
        return matrix and number >= self.matrix_share * self._structured_size(candidate.layer)

    def _is_whole(self, candidate: SparseCandidate, number: int) -> bool:
        return candidate.values.ndim == 1 and number >= self.vector_share * candidate.values.numel()

    def _structured_size(self, layer: Layer) -> int:
        """Trained values of the structured change of a matrix."""
        if self.structure == "lora":
            return self.rank * (layer.in_features + layer.out_features)
        read = layer.in_features if layer.site == "proj" else layer.out_features
        return self.rank * (read + layer.out_features + 1) + layer.out_features


def _counts(scores: Mapping[str, torch.Tensor], threshold: float) -> dict[str, int]:
    return {name: int(torch.count_nonzero(score >= threshold)) for name, score in scores.items()}
