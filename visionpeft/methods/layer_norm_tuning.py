"""Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models (Qi et al., 2022).

https://arxiv.org/abs/2211.08682
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of

NORMS = ("LayerNorm", "RmsNorm", "RMSNorm", "SimpleNorm")


@dataclass(frozen=True)
class LayerNormTuning(Method):
    """Trains the scale and shift of every normalisation of the backbone; nothing is added.

    All norms of the chosen blocks, and with the last block those after the blocks, with the first those before them,
    with the first of a stage those between it and the stage before.
    On a model that has layer sites only, norms of every kind (batch and group normalisation, too), those outside the
    blocks where `blocks` are all; batch normalisation keeps its stored statistics.
    As weights of the backbone are trained themselves, samples of one batch cannot be routed through two of them.
    Mergeable. Trainable on L blocks of width D: 4 D L + 2 D; 38,400 on ViT-B/16.
    Source: Qi et al., Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models, 2022.

    Args:
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    needs_blocks: ClassVar = False
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def trains(self, tower: Tower) -> Iterator[str]:
        """Parameters of the norms."""
        blocks = blocks_of(self, tower)
        if tower.layers_only is not None:
            yield from self._of_layers(tower, blocks)
            return
        chosen = {id(p) for index in blocks for p in norm_parameters(tower.blocks[index].module)}
        in_blocks = {id(p) for block in tower.blocks for p in block.module.parameters()}
        # Those that are no layer site of the tower, such as the norm of a pooling, come after the blocks.
        outside = dict.fromkeys({id(p) for p in norm_parameters(tower.module)} - in_blocks, tower.depth - 1)
        for site, layer in tower.layers.items():
            if layer.kind == "norm":
                outside |= dict.fromkeys(map(id, layer.owner.parameters()), tower.belongs_to(site))
        chosen |= {parameter for parameter, block in outside.items() if block in blocks}
        for name in tower.parameter_names():
            if id(tower.module.get_parameter(name)) in chosen:
                yield name

    def _of_layers(self, tower: Tower, blocks: list[int]) -> Iterator[str]:
        """Likewise for a tower of layers; norms outside the blocks with all of them."""
        chosen = {
            id(parameter)
            for index, layer in tower.all_layers()
            if layer.kind == "norm" and (len(blocks) == tower.depth if index is None else index in blocks)
            for parameter in layer.owner.parameters(recurse=False)
        }
        yield from (name for name in tower.parameter_names() if id(tower.module.get_parameter(name)) in chosen)


def norm_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of the normalisations over channels in a module, which the libraries name so."""
    for each in module.modules():
        if any(name in type(each).__name__ for name in NORMS):
            yield from each.parameters(recurse=False)
