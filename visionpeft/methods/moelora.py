"""MOELoRA: When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical Applications (Liu et al., 2023).

https://arxiv.org/abs/2310.18339
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import require
from visionpeft.methods.parts.by_task import ByTask
from visionpeft.methods.parts.low_rank_experts import LowRankExperts
from visionpeft.methods.parts.router import Router
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.sites import Placement
from visionpeft.sites.tasks_of_rows import one_task, rows_of

EMBEDDING = 64


class TaskLowRank(LowRankExperts):
    """`LowRankExperts`, whose shares for all tokens of an image are router(embedding of its task).

    The embeddings (tasks, 64) are N(0, 1).
    """

    stackable = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        experts: int,
        rank: int,
        scaling: float,
        dropout: float,
        tasks: Sequence[str],
    ):
        super().__init__(in_features, out_features, experts, rank, scaling, dropout, std=0.01)
        self.embedding = nn.Parameter(torch.randn(max(1, len(tasks)), EMBEDDING))
        self.router = Router(EMBEDDING, experts)
        self.tasks = tuple(tasks)

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (rows, ..., in) and output y (rows, ..., out) of the layer to the changed output."""
        # A lookup, because indexing with a single number would wait for it and break a compiled graph.
        shares = F.embedding(rows_of(self.tasks, x, "MOELoRA"), self.router(self.embedding))
        if shares.ndim == 2:  # an image has the same for all its tokens
            shares = shares.view(len(x), *[1] * (x.ndim - 2), -1)
        return self.changed(x, y, shares)

    def merge(self, weight: torch.Tensor, bias):
        """Weight and bias that compute the same for images of one task: W + scaling sum_e p_e B_e A_e."""
        task = one_task(self.tasks, weight, "MOELoRA")
        shares, A, B = (each.to(weight) for each in (self.router(self.embedding)[task], self.A, self.B))
        return weight + self.scaling * torch.einsum("e,eor,eri->oi", shares, B, A), bias


@dataclass(frozen=True)
class MOELoRA(ByTask):
    """Low-rank changes that each task weighs for itself: W x + (alpha / rank) sum_e p_e B_e A_e x for E experts.

    The experts have rank / E each. The shares are p = softmax(G t) of an embedding t (64) of the task, N(0, 1), with a
    G (E, 64), N(0, 0.02), both for every target; `visionpeft.of_tasks` says the task of an image, in a run of
    `MultiTask` data its label. A_e (rank / E, in) is N(0, 0.01), B_e (out, rank / E) is zero: no change at the start.
    Mergeable for one task, exactly: within `visionpeft.of_tasks(task)`. With one task it need not be named.
    Trainable: sum over target layers of rank * (in + out) + 64 * (tasks + E); 603,648 on ViT-B/16 with one task.
    In the authors' code there is one embedding more than tasks, which is never read; it is left out.
    Source: Liu, Wu, Zhao, Zhu, Xu, Tian and Zheng, When MOE Meets LLMs, 2023, and the authors' code
    (liuqidong07/MOELoRA-peft); alpha as recalled, and the start of the gate is that of all mixtures here.

    Args:
        experts: number of low-rank changes of each target.
        rank: of all of them together, a multiple of their number.
        alpha: numerator of the scale alpha / rank; None for a scale of 1.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        dropout: dropout on the input of A.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
        tasks: names of the tasks; those of the data are filled in by `visionpeft.fit`. With none there is one task,
            which need not be said.
    """

    experts: int = 8
    rank: int = 16
    alpha: float | None = 32
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.1
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.experts > 0, self, "experts must be a positive integer")
        several = self.rank > 0 and self.rank % self.experts == 0
        require(several, self, f"rank {self.rank} must be a positive multiple of the {self.experts} experts")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        require_targets(self)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `TaskLowRank` at every target layer of the chosen blocks."""
        scaling = 1.0 if self.alpha is None else self.alpha / self.rank
        for index, layer in target_layers(self, tower):
            sizes = layer.in_features, layer.out_features, self.experts, self.rank // self.experts
            yield Placement(tower.name, index, layer.site, TaskLowRank(*sizes, scaling, self.dropout, self.tasks))
