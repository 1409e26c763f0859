"""What putting adapters in force has made of a model, kept so that they can be put in force again at once.

Describing a model and deciding what acts where takes milliseconds, and adapters are switched in every step of some
learners and for every batch that is routed. What was decided holds as long as the model and the adapters are made of
the same modules, of the same classes; whatever was changed by hand is decided anew, or refused, as it was the first
time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch.nn as nn

from visionpeft.adapters.attached_adapter import join
from visionpeft.backbones.tower import Backbone
from visionpeft.errors import UnsupportedError
from visionpeft.sites import SitedLayer, give_class, sited_layer_class
from visionpeft.sites.routing import KEPT

FUSING = ("fuse", "reparameterize", "switch_to_deploy")  # timm's, which make one layer of several by their weights
METHODS = ("forward_intermediates", "group_matcher", "no_weight_decay", *FUSING)
# What a module has in its own `__dict__` while adapters act or are routed, and only then.
ATTRIBUTES = ("sites", "acting", "entering", "copies", *METHODS, *KEPT)


class Swaps:
    """Which modules are to have another class, and what they are to have besides; nothing is done to them yet.

    Args:
        originals: the own classes of modules that have another one now.
    """

    def __init__(self, originals: dict[nn.Module, type] | None = None):
        self.originals = originals or {}
        self.kinds: dict[nn.Module, type] = {}
        self.given: dict[nn.Module, dict[str, object]] = {}

    def original(self, module: nn.Module) -> type:
        """The module's own class."""
        return self.originals.get(module, type(module))

    def kind(self, module: nn.Module) -> type:
        """The class that it is to have."""
        return self.kinds.get(module, self.original(module))

    def swap(self, module: nn.Module, kind: type, **given) -> None:
        """Give a module a class, and attributes besides those it was given before."""
        self.kinds[module] = kind
        self.given.setdefault(module, {}).update(given)

    def swap_layer(self, layer: nn.Module, **given) -> None:
        """Give a layer that is called its sited class, unless it has it."""
        kind = self.kind(layer)
        self.swap(layer, kind if issubclass(kind, SitedLayer) else sited_layer_class(kind), **given)


class Anatomy:
    """The modules of a tree with their classes and children, as they are now.

    Args:
        root: the root of the tree.
        without: the root of a part that is left out.
    """

    def __init__(self, root: nn.Module, without: nn.Module | None = None):
        self.root = root
        modules = [*root.named_modules(memo=None if without is None else {without})]
        self.paths = {module: path for path, module in modules}
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


class Rested:
    """The parameters of an adapter that were trained when all of it came to rest.

    Args:
        anatomy: the adapter.
        places: owner, name and value of each, as `Anatomy.parameters` gives them.
    """

    def __init__(self, anatomy: Anatomy, places: list[tuple[str, str, nn.Parameter]]):
        owners = {path: module._parameters for path, module in anatomy._owners}
        self.places = [(owners[path], name, parameter) for path, name, parameter in places]
        self.paths = frozenset(join(path, name) for path, name, _ in places)
        self.everything = len(places) == sum(True for _ in anatomy.parameters())

    def holds(self, trained: bool) -> bool:
        """Whether they are still there, and all of them trained, or none."""
        return all(own.get(name) is p and p.requires_grad is trained for own, name, p in self.places)


@dataclass
class Installation:
    """What certain adapters that are active together make of a model.

    Args:
        model: the modules of the model without adapters, while none acts.
        adapters: the acting adapters by name.
        swapped: the modules that have another class, with their own one, that one, and what they have besides.
        backbone: the described model.
    """

    model: Anatomy
    adapters: dict[str, Anatomy]
    swapped: list[tuple[nn.Module, type, type, dict]]
    backbone: Backbone
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

    def put_in_force(self) -> list["Swapped"]:
        """Give the modules their classes; returns what they were.

        Raises:
            UnsupportedError: Python lets no object of a module's class have another one; nothing is changed.
        """
        for index, (module, _, kind, own) in enumerate(self.swapped):
            try:
                give_class(module, kind)
            except UnsupportedError:
                for changed, original, _, _ in self.swapped[:index]:
                    give_class(changed, original)
                    for attribute in ATTRIBUTES:
                        changed.__dict__.pop(attribute, None)
                raise
            module.__dict__.update(own)
        return [Swapped(module, original, vars(module).get("forward")) for module, original, _, _ in self.swapped]


class Swapped(NamedTuple):
    """A module that has another class while adapters act or are routed.

    Args:
        module: the module.
        original: its own class.
        forward: the forward that it had of its own then, None for that of its class.
    """

    module: nn.Module
    original: type
    forward: Callable | None
