"""EVA: One Initialization to Rule them All (Paischer et al., 2024), https://arxiv.org/abs/2410.07170."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from visionpeft.backbones.tower import Tower
from visionpeft.methods.lora import LowRank, concatenated
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require, require_same
from visionpeft.methods.parts.measures import Measures, Place
from visionpeft.methods.parts.targets import require_targets, target_layers
from visionpeft.sites import Placement

CHOOSING = ("rank", "alpha", "dropout", "rho", "whiten", "adjust_scale", "samples", "ranks")


@dataclass(frozen=True)
class EVA(Method):
    """LoRA that starts along what its layers read, with ranks given to the layers whose inputs they explain best.

    W + s B A, where the rows of A start as the top right singular vectors of X, the inputs of the layer as one matrix
    (tokens, in) over the tokens of all positions and of all measured images, and B starts at zero: no change at the
    start. The ranks are redistributed: singular value i of a layer explains the share S_i^2 / sum_j S_j^2 of its
    inputs; of the components of all target layers, at most floor(rho rank) of each, the rank * layers that explain most
    become ranks, and a layer may get none, and then nothing acts there. `visionpeft.allocate` measures X before
    training (the command line does it by itself); labels are not used. q, k and v read the same and compete apart.
    With `adjust_scale`, s = alpha / rank with the mean rank at every layer, so that gradients have one size whatever a
    layer got; without, alpha over its own rank. With `whiten`, each row of A is divided by the square root of its
    singular value, as in the published code, whose authors found it useful on images.
    The published codes find the vectors by an incremental decomposition that stops when two steps agree to a cosine of
    0.99, and peft's subtracts the mean of the inputs first; this one has them exactly, from X^T X, mean included.
    Mergeable. peft reads it after `export_peft`, and what peft started so is read by `import_peft` as `LoRA`.
    Trainable: sum over target layers of their rank * (in + out); as many as LoRA where layers are of one size, 294,912
    on ViT-B/16 for a mean rank of 8 on q and v.
    Source: Paischer et al., One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation, 2024.

    Args:
        rank: mean rank r of the layers.
        alpha: numerator of the scale; None for a scale of 1.
        rho: how many times the mean rank a layer may get at most; 1 for the same rank everywhere.
        whiten: divide the rows of A by the roots of the singular values.
        adjust_scale: whether the scale is that of the mean rank everywhere.
        samples: how many samples are measured; None for all.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        dropout: dropout on the input of A.
        ranks: rank of each layer; found by `allocate`, not to be given.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower. Ranks are shared out in each.
    """

    found: ClassVar[tuple[str, ...]] = ("ranks",)

    rank: int = 8
    alpha: float | None = None
    rho: float = 2.0
    whiten: bool = False
    adjust_scale: bool = True
    samples: int | None = 1024
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    ranks: dict[str, int] | None = None
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.rank > 0, self, "rank must be a positive integer")
        require(self.rho >= 1, self, f"rho must be at least 1, not {self.rho}")
        require(self.samples is None or self.samples > 0, self, "samples must be a positive integer, or None for all")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        require_targets(self)

    @property
    def pending(self) -> bool:
        """Whether the inputs have not been measured."""
        return self.ranks is None

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `LowRank` at every target layer that has a rank."""
        for index, layer in target_layers(self, tower):
            path = Place(tower.name, index, layer.site).path
            if rank := self.ranks.get(path, 0):
                module = LowRank(layer.in_features, layer.out_features, rank, self.scale(rank), self.dropout)
                yield Placement(tower.name, index, layer.site, module)

    def scale(self, rank: int) -> float:
        """Factor of B A at a layer of this rank."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (self.rank if self.adjust_scale else rank)

    def allocate(self, towers: Sequence[Tower], measures: Measures) -> tuple[Method, dict[str, torch.Tensor]]:
        """Share out the ranks by what they explain of the inputs, and let A start there."""
        places = {
            tower.name: [Place(tower.name, index, layer.site) for index, layer in target_layers(self, tower)]
            for tower in towers
        }
        moments = measures.inputs([place for each in places.values() for place in each], self.samples)
        ranks, tensors = {}, {}
        decomposed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # those of q and v are one tensor
        for of_tower in places.values():
            components = {}
            for place in of_tower:
                moment = moments[place]
                if id(moment) not in decomposed:
                    decomposed[id(moment)] = directions(moment)
                components[place] = decomposed[id(moment)]
            shares = {place: values / values.sum() for place, (values, _) in components.items()}
            for place, rank in shared_out(shares, self.rank, int(self.rho * self.rank)).items():
                values, vectors = (each[:rank] for each in components[place])
                if self.whiten:
                    vectors = vectors / values.sqrt().sqrt()[:, None]
                ranks[place.path] = rank
                tensors[f"{place.path}.A"] = vectors
        return dataclasses.replace(self, ranks=ranks), tensors

    def combine(self, methods, parts, weights):
        """EVA that changes each weight by the weighted sum of the changes: ranks are put one after another."""
        require_same(methods, but=CHOOSING)
        _, tensors = concatenated(parts, weights, [method.scale for method in methods])
        ranks = {path.removesuffix(".A"): len(A) for path, A in tensors.items() if path.endswith(".A")}
        return dataclasses.replace(self, alpha=None, ranks=ranks), tensors


def directions(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared singular values (in,), descending, and right singular vectors (in, in) in rows of X, by X^T X."""
    values, vectors = torch.linalg.eigh(moment.cpu().double())
    return values.flip(0).clamp(min=0), vectors.flip(1).mT


def shared_out(shares: Mapping[Place, torch.Tensor], mean: int, most: int) -> dict[Place, int]:
    """Ranks of layers that have one: of the largest shares of all layers, as many as `mean` times the layers."""
    offered = [(share, place) for place, each in shares.items() for share in each[:most].tolist() if share > 0]
    offered.sort(key=lambda entry: -entry[0])  # equal ones stay in the order of the layers
    return dict(Counter(place for _, place in offered[: mean * len(shares)]))
