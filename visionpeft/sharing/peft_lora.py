"""LoRA and DoRA: what peft keeps for one module, and what acts at its layer sites here."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.quantised import full_precision
from visionpeft.backbones.tower import Backbone
from visionpeft.errors import StorageError, UnsupportedError
from visionpeft.methods.dora import DecomposedLowRank, DoRA
from visionpeft.methods.lora import LoRA, LowRank
from visionpeft.sharing.peft_config import PeftConfig, expression
from visionpeft.sharing.peft_initial import makes_again, with_part
from visionpeft.sharing.peft_modules import Part, PeftModule


@dataclass(frozen=True)
class Change:
    """What LoRA or DoRA adds to a whole weight (out, in), a convolution's without its kernel's shape: s B A.

    Args:
        A: (rank, in).
        B: (out, rank).
        scale: s.
        magnitude: lengths of the rows (out,) that DoRA gives the changed weight, None for LoRA.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None

    @torch.no_grad()
    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """The changed weight, in float64."""
        changed = weight.double() + self.scale * (self.B.double() @ self.A.double())
        return changed if self.magnitude is None else changed * (self.magnitude.double() / changed.norm(dim=1))[:, None]


def read_change(
    config: PeftConfig, path: str, weight: torch.Tensor, tensors: dict[str, torch.Tensor], what: str
) -> Change:
    """The change of one module's weight.

    Where peft took a part of the weight for the adapter, it is that of the weight before, of a higher rank.

    Raises:
        StorageError: a tensor is missing, not expected, or of another shape than configuration and backbone say.
    """
    config.require_one_alpha(path, what)
    rank, kernel = config.rank(path), weight.shape[2:]
    scale = config.alpha(path) / rank
    if makes_again(config):
        rank = min(rank, *weight.shape)  # a weight has no more components, but its scale is that of the rank asked for
    shapes = {"lora_A": (rank, *weight.shape[1:]), "lora_B": (len(weight), rank, *(1 for _ in kernel))}
    if config.use_dora:
        shapes["lora_magnitude_vector"] = (len(weight),)
        if kernel:
            raise StorageError(f"{what} changes {path} by DoRA, which acts on linear layers only")
    if config.kasa:
        shapes["lora_diag"] = (rank,)
    if kernel and makes_again(config):
        raise StorageError(f"{what} changes {path}, but what peft takes out of weights is that of linear layers only")
    check_shapes(tensors, shapes, path, what)
    A, B = tensors["lora_A"].flatten(1), tensors["lora_B"].flatten(1)
    if config.kasa:
        A = tensors["lora_diag"][:, None] * A
    if makes_again(config):
        A, B = with_part(config, full_precision(weight), A, B, scale, f"{path} in {what}")
    return Change(A, B, scale, tensors.get("lora_magnitude_vector"))


def check_shapes(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], path: str, what: str
) -> None:
    """Refuse tensors of a module that are not those of these names and shapes.

    Raises:
        StorageError: a tensor is missing, not expected, or of another shape.
    """
    if tensors.keys() != shapes.keys():
        raise StorageError(f"{what} has {', '.join(sorted(tensors))} for {path} instead of {', '.join(shapes)}")
    for part, shape in shapes.items():
        if tensors[part].shape != shape:
            raise StorageError(
                f"{part} of {path} in {what} is {tuple(tensors[part].shape)} instead of {shape}, by its "
                "adapter_config.json and this backbone"
            )


def split(config: PeftConfig, module: PeftModule, tensors: dict[str, torch.Tensor], what: str) -> Iterator[Part]:
    """The change of one module at each of its layer sites: a copy of A, and the rows of B and of the magnitude.

    Raises:
        StorageError: a tensor is missing, not expected, or of another shape than configuration and backbone say.
    """
    change = read_change(config, module.path, module.module.weight, tensors, what)
    rank = len(change.A)
    for site, layer in module.layers.items():
        rows = slice(None) if layer.rows is None else layer.rows
        state = {"A": change.A, "B": change.B[rows]}
        if change.magnitude is not None:
            state["magnitude"] = change.magnitude[rows]
        yield Part((module.tower, module.block, site), layer.target, state, rank, change.scale * rank)


def methods(config: PeftConfig, backbone: Backbone, parts: list[Part], what: str) -> Iterator[LoRA | DoRA]:
    """Methods that together place every part: one for each scale and set of blocks.

    Raises:
        StorageError: the halves of a gated MLP, which are one target, are not changed alike.
    """
    check_halves(backbone, parts, what)
    spread = defaultdict(set)
    for part in parts:
        tower, block, _ = part.place
        spread[tower, part.target, part.alpha].add(block)
    groups = defaultdict(list)
    for (tower, target, alpha), blocks in spread.items():
        groups[tower, alpha, frozenset(blocks)].append(target)
    for (tower, alpha, blocks), targets in groups.items():
        ranks = {
            (part.place[1], part.target): part.rank
            for part in parts
            if part.place[0] == tower and part.alpha == alpha and part.place[1] in blocks and part.target in targets
        }
        rank = most_common(ranks.values())
        every = blocks in ({None}, set(range(backbone.towers[tower].depth)))
        yield (DoRA if config.use_dora else LoRA)(
            rank=rank,
            alpha=alpha,
            targets=tuple(targets),
            # What peft has taken out of the weight is never dropped there, and here it is a part of the change.
            dropout=0.0 if makes_again(config) else config.lora_dropout,
            overrides={f"{block}/{target}": r for (block, target), r in ranks.items() if r != rank},
            blocks="all" if every else sorted(blocks),
            towers=tower,
        )


def join(changes: Sequence[tuple[PeftModule, list[tuple[slice, nn.Module]]]]) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors of peft, by their names, and fields of its configuration for changes of rows of modules.

    Raises:
        UnsupportedError: several of DoRA at the same rows, of which each gives the changed weight its own lengths.
    """
    tensors, ranks, alphas = {}, {}, {}
    for module, parts in changes:
        path, weight = module.path, module.module.weight
        if isinstance(parts[0][1], DecomposedLowRank) and not _are_disjoint(parts):
            raise UnsupportedError(
                f"two changes of DoRA act on the same rows of {path}, and peft has one; attach and export them one by "
                "one, or merge them"
            )
        A, B, scaling = one_change(module, parts)
        tensors[f"{path}.lora_A.weight"] = A.unflatten(1, weight.shape[1:])
        tensors[f"{path}.lora_B.weight"] = B.view(*B.shape, *(1 for _ in weight.shape[2:]))
        if isinstance(parts[0][1], DecomposedLowRank):
            magnitude = weight.detach().to(A).norm(dim=1)  # rows that are not changed keep their length
            for rows, part in parts:
                magnitude[rows] = part.magnitude
            tensors[f"{path}.lora_magnitude_vector"] = magnitude
        ranks[path], alphas[path] = len(A), scaling * len(A)
    rank, alpha = most_common(ranks.values()), most_common(alphas.values())
    dropouts = {part.dropout.p for _, parts in changes for _, part in parts}
    return tensors, {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{expression(path)}": r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{expression(path)}": a for path, a in alphas.items() if a != alpha},
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
        "bias": "none",
        "use_dora": isinstance(changes[0][1][0][1], DecomposedLowRank),
    }


def most_common(values):
    """The most frequent value."""
    return Counter(values).most_common(1)[0][0]


@torch.no_grad()
def one_change(module: PeftModule, parts: list[tuple[slice, LowRank]]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A (rank, in), B (out, rank) and the scale of one change that is the sum of changes of some rows.

    Those of HiRA have no scale.
    """
    scales = {getattr(part, "scaling", 1.0) for _, part in parts}
    first = parts[0][1].A
    shared = _are_disjoint(parts) and len(scales) == 1 and all(torch.equal(part.A, first) for _, part in parts)
    A = first if shared else torch.cat([part.A for _, part in parts])
    B = A.new_zeros(len(module.module.weight), len(A))
    start = 0
    for rows, part in parts:
        stop = start + len(part.A)
        B[rows, start:stop] = part.B if len(scales) == 1 else part.scaling * part.B
        start = 0 if shared else stop
    return A, B, scales.pop() if len(scales) == 1 else 1.0


def _are_disjoint(parts: list[tuple[slice, nn.Module]]) -> bool:
    """Whether no two changes are of the same rows; those of a site are always the same."""
    return len({rows.start for rows, _ in parts}) == len(parts)


def check_halves(backbone: Backbone, parts: list[Part], what: str) -> None:
    """Refuse changes of the halves of a gated MLP, which are one target, that are not of one size.

    Raises:
        StorageError: naming the halves.
    """
    found: dict[tuple, dict[str, tuple]] = defaultdict(dict)
    for part in parts:
        tower, block, site = part.place
        if block is not None:
            found[tower, block, part.target][site] = part.rank, part.alpha
    for (tower, block, target), values in found.items():
        sites = [s for s, layer in backbone.towers[tower].blocks[block].layers.items() if layer.target == target]
        if len(set(values.values())) > 1 or set(sites) != set(values):
            raise StorageError(
                f"{what} changes {' and '.join(values)} of block {block} otherwise than {' and '.join(sites)}, but the "
                f"target {target} is one rank and scale for all of them"
            )
