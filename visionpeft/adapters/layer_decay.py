"""How far from the output each parameter of a model acts, for learning rates that decay from layer to layer.

Distances: 0 a head; 1 the last block and the norms after it; L the first of L blocks; L + 1 what comes before them.
What is between two stages has the distance of the block that follows.
A parameter of an adapter has the distance of the block or layer it acts in, a trained copy that of its original, and
what several blocks share that of the first of them. timm counts the same layers from the input
(`timm.optim.param_groups_layer_decay`, after Bao et al., BEiT, 2021).
"""

from collections.abc import Iterator

import torch.nn as nn

from visionpeft.adapters.adapters import Adapters
from visionpeft.adapters.attached_adapter import AttachedAdapter
from visionpeft.backbones.tower import Backbone, Tower
from visionpeft.backbones.whole_model import describe


def distances(model: nn.Module) -> dict[str, int]:
    """Distance from the output of every parameter of a model in which adapters act, by name; of theirs, too."""
    peft: Adapters = model.peft
    backbone = peft.backbone or describe(model)
    depth = max(tower.depth for tower in backbone.towers.values())
    own = dict(_of_model(backbone, depth))
    found = dict(own)
    for name, adapter in peft.items():
        found |= {f"peft.{name}.{path}": distance for path, distance in _of_adapter(adapter, backbone, own)}
    return found


def _of_model(backbone: Backbone, depth: int) -> Iterator[tuple[str, int]]:
    heads = tuple(f"{path}." for path in (*backbone.heads, *backbone.unused_heads))
    places: dict[nn.Parameter, int] = {}
    for tower in backbone.towers.values():
        for site in tower.final_norms:
            if site in tower.layers:
                places |= dict.fromkeys(tower.layers[site].owner.parameters(), 1)
        for site, layer in tower.layers.items():
            if tower.between_stages(site) is not None:
                places |= dict.fromkeys(layer.owner.parameters(), tower.depth - tower.between_stages(site))
        for index, block in enumerate(tower.blocks):
            places |= dict.fromkeys(block.module.parameters(), tower.depth - index)
    for name, parameter in backbone.model.named_parameters():
        if not name.startswith("peft."):
            yield name, 0 if name.startswith(heads) else places.get(parameter, depth + 1)


def _of_adapter(adapter: AttachedAdapter, backbone: Backbone, own: dict[str, int]) -> Iterator[tuple[str, int]]:
    acting: dict[nn.Parameter, int] = {}
    for _, placement in adapter.placements:
        tower = backbone.towers[placement.tower]
        for parameter in placement.module.parameters():
            acting[parameter] = max(acting.get(parameter, 0), _of_place(tower, placement.block, placement.site))
    shared: dict[str, int] = {}  # tower -> the first place that the adapter acts at
    for _, placement in adapter.placements:
        place = _of_place(backbone.towers[placement.tower], placement.block, placement.site)
        shared[placement.tower] = max(shared.get(placement.tower, 0), place)
    heads = tuple(f"{path}." for path in adapter.head_paths)
    for path, parameter in adapter.named_parameters():
        if path.startswith("trained."):
            yield path, own[path.removeprefix("trained.")]
        elif path.startswith(heads):
            yield path, 0
        else:
            yield path, acting.get(parameter, shared.get(path.split(".")[1], 0))


def _of_place(tower: Tower, block: int | None, site: str) -> int:
    block = tower.between_stages(site) if block is None else block
    if block is not None:
        return tower.depth - block
    return 1 if site in tower.final_norms else tower.depth + 1


class NoWeightDecay:
    """Stands in for a timm model's `no_weight_decay`, which names parameters of which copies are trained.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self) -> set[str]:
        """Names of parameters without weight decay, and of their trained copies."""
        names = type(self.model).no_weight_decay(self.model)
        adapters: Adapters = self.model.peft
        copies = {
            f"peft.{name}.trained.{each}" for name in adapters for each in adapters[name].trained_names if each in names
        }
        return {*names, *copies}


class GroupMatcher:
    """Stands in for a timm model's `group_matcher`, whose patterns do not know the parameters of adapters.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, coarse: bool = False):
        """A function from the name of a parameter to its layer, 0 at the input; the library's patterns if coarse."""
        if coarse:
            return type(self.model).group_matcher(self.model, coarse=True)
        names = distances(self.model)
        last = max(names.values())
        return lambda name: last - names.get(name, last)
