"""What putting adapters in force has made of a model, kept so that they can be put in force again at once.

Describing a model and deciding what acts where takes milliseconds, and adapters are switched in every step of some
learners and for every batch that is routed. What was decided holds as long as the model and the adapters are made of
the same modules, of the same classes; whatever was changed by hand is decided anew, or refused, as it was the first
time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch.nn as nn

from visionpeft.adapters.route import Batch
from visionpeft.backbones.tower import Backbone

# What a module has in its own `__dict__` while adapters act, and only then.
ATTRIBUTES = ("sites", "acting", "entering", "copies", "routed", "forward_intermediates", "group_matcher")


class Anatomy:
    """The modules of a tree with their classes and children, as they are now.

    Args:
        root: the root of the tree.
        without: the root of a part that is left out.
    """

    def __init__(self, root: nn.Module, without: nn.Module | None = None):
        self.root = root
        modules = [*root.named_modules(memo=None if without is None else {without})]
        self._seen = [(module, type(module), dict(module._modules)) for _, module in modules]
        self._owners = [(path, module) for path, module in modules if module._parameters]

    def holds(self) -> bool:
        """Whether the tree still is made of the same modules."""
        return all(module.__class__ is kind and module._modules == children for module, kind, children in self._seen)

    def parameters(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Path of the owner, name and value of each parameter, several times where it is tied."""
        for path, module in self._owners:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield path, name, parameter


@dataclass
class Installation:
    """What certain adapters, active together or routed, make of a model.

    Args:
        model: the modules of the model without adapters, while none acts.
        adapters: the acting adapters by name.
        swapped: the modules that have another class, with their own one, that one, and what they have besides.
        backbone: the described model.
        batch: which samples go to which adapter, where they are routed.
    """

    model: Anatomy
    adapters: dict[str, Anatomy]
    swapped: list[tuple[nn.Module, type, type, dict]]
    backbone: Backbone
    batch: Batch | None = None
    copies: list[tuple[nn.Module, str, nn.Module, str]] = field(default_factory=list)

    def __post_init__(self):
        self.placements = {name: list(anatomy.root.placements) for name, anatomy in self.adapters.items()}
        for module, _, _, own in self.swapped:
            self.copies += [(module, slot, *copy) for slot, copy in own.get("copies", {}).items()]

    def holds(self, adapters: nn.ModuleDict) -> bool:
        """Whether it is still what these adapters make of the model, in which none acts now."""
        for name, anatomy in self.adapters.items():
            adapter = adapters._modules.get(name)
            if adapter is not anatomy.root or adapter.placements != self.placements[name]:
                return False
        fitting = all(
            getattr(module._parameters.get(slot), "shape", None) == getattr(holder, name).shape
            for module, slot, holder, name in self.copies
        )
        return fitting and self.model.holds() and all(anatomy.holds() for anatomy in self.adapters.values())

    def put_in_force(self) -> list[tuple[nn.Module, type]]:
        """Give the modules their classes again; returns them with their own ones."""
        for module, _, kind, own in self.swapped:
            object.__setattr__(module, "__class__", kind)  # that of modules first asks whether it is a parameter
            module.__dict__.update(own)
        return [(module, original) for module, original, _, _ in self.swapped]


def of_swapped(swapped: list[tuple[nn.Module, type]]) -> list[tuple[nn.Module, type, type, dict]]:
    """Each module once, with its own class, the one it has now, and what it has in its `__dict__` while it has it."""
    found: dict[nn.Module, type] = {}
    for module, original in swapped:
        found.setdefault(module, original)
    return [
        (module, original, type(module), {key: vars(module)[key] for key in ATTRIBUTES if key in vars(module)})
        for module, original in found.items()
    ]
