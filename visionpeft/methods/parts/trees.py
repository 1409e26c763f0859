"""Trees of modules made from their paths."""

from collections.abc import Mapping

import torch.nn as nn


def tree_of(modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """A tree in which every module is at its path, such as <tower>.<block>.<site>."""
    tree = nn.ModuleDict()
    for path, module in modules.items():
        *owners, last = path.split(".")
        inside = tree
        for name in owners:
            if name not in inside:
                inside[name] = nn.ModuleDict()
            inside = inside[name]
        inside[last] = module
    return tree
