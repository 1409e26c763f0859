"""What a method makes of its modules when it is saved as another method."""

from collections.abc import Mapping

import torch.nn as nn


def tree_of(modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """Modules by their dotted paths, such as "visual.3.q", as a tree."""
    root = nn.ModuleDict()
    for path, module in modules.items():
        *owners, name = path.split(".")
        inside = root
        for owner in owners:
            if owner not in inside:
                inside[owner] = nn.ModuleDict()
            inside = inside[owner]
        inside[name] = module
    return root
