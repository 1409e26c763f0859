"""IA3: what peft keeps for one module, and what acts at its sites here."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Backbone
from visionpeft.errors import StorageError
from visionpeft.methods.ia3 import IA3, ScaleInput
from visionpeft.sharing.peft_config import PeftConfig, expression
from visionpeft.sharing.peft_modules import Part, PeftModule


def split(config: PeftConfig, module: PeftModule, tensors: dict[str, torch.Tensor], what: str) -> Iterator[Part]:
    """The scales of one module: those of keys and values, or of what fc2 reads.

    Raises:
        StorageError: they are of another shape than the backbone says, or scale what IA3 does not.
    """
    weight, place = module.module.weight, (module.tower, module.block)
    reads = config.scales_input(module.path)
    shape = (1, weight.shape[1]) if reads else (len(weight), 1)
    if tensors.keys() != {"ia3_l"} or tensors["ia3_l"].shape != shape:
        raise StorageError(f"{module.path} in {what} has no ia3_l of shape {shape}")
    scale = tensors["ia3_l"].flatten()
    if reads and "fc2" in module.layers:
        yield Part((*place, "hidden"), "hidden", {"scale": scale})
        return
    for site, layer in module.layers.items():
        rows = slice(None) if layer.rows is None else layer.rows
        if site in ("k", "v") and not reads:
            yield Part((*place, site), site, {"scale": scale[rows]})
        elif reads or not torch.equal(scale[rows], torch.ones_like(scale[rows])):
            raise StorageError(
                f"{what} scales the {'input' if reads else 'output'} of {site} in {module.path}; IA3 scales keys, "
                "values and what fc2 reads"
            )


def methods(config: PeftConfig, backbone: Backbone, parts: list[Part], what: str) -> Iterator[IA3]:
    """Methods that together place every part: one for each set of blocks."""
    spread = defaultdict(set)
    for part in parts:
        spread[part.place[0], part.target].add(part.place[1])
    groups = defaultdict(list)
    for (tower, target), blocks in spread.items():
        groups[tower, frozenset(blocks)].append(target)
    for (tower, blocks), targets in groups.items():
        every = len(blocks) == backbone.towers[tower].depth
        yield IA3(targets=tuple(targets), blocks="all" if every else sorted(blocks), towers=tower)


def join(changes: Sequence[tuple[PeftModule, list[tuple[slice, nn.Module]]]]) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors of peft, by their names, and fields of its configuration for scales of rows or inputs of modules."""
    tensors, reading = {}, []
    for module, parts in changes:
        weight = module.module.weight
        reads = isinstance(parts[0][1], ScaleInput)
        scale = parts[0][1].scale.detach().new_ones(weight.shape[1] if reads else len(weight))
        for rows, part in parts:
            scale[rows] *= part.scale.detach()
        tensors[f"{module.path}.ia3_l"] = scale[None] if reads else scale[:, None]
        if reads:
            reading.append(module.path)
    return tensors, {"feedforward_modules": "|".join(map(expression, reading)) or []}
