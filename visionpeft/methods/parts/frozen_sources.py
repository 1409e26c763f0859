"""Methods that learn how to use several trained adapters, which stay frozen inside the new one."""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_type_hints

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.errors import ConfigurationError
from visionpeft.methods.parts.base import Method, describe_method, require
from visionpeft.methods.parts.field_types import from_json
from visionpeft.sites import Placement


class Frozen(nn.ModuleList):
    """Modules whose parameters are buffers: saved, moved and cast with the adapter, never trained nor counted.

    They stay in evaluation mode, so that nothing is drawn in them.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__(modules)
        for module in [*self.modules()]:
            for name, value in [*module.named_parameters(recurse=False)]:
                del module._parameters[name]
                module.register_buffer(name, value.detach())
        self.train(False)

    def train(self, mode: bool = True):
        """Evaluation mode, whatever is asked for."""
        return super().train(False)


@dataclass(frozen=True)
class OverAdapters(Method):
    """Base of methods over trained adapters of other methods, `kinds`, that act at the same places.

    A method implements `mix`, which makes the module of one place. It keeps the adapters in `frozen`, a `Frozen`, in
    their order. `attach` fills them in; a saved adapter holds them itself and names no folder.

    Args:
        adapters: names of adapters that are attached to the model; on the command line, folders of saved ones.
        sources: class and fields of their methods; found by `attach`, not to be given.
    """

    kinds: ClassVar[tuple[type[Method], ...]] = ()

    adapters: tuple[str, ...] = ()
    sources: list[dict[str, Any]] | None = None

    def __post_init__(self):
        super().__post_init__()
        repeated = len(set(self.adapters)) < len(self.adapters)
        require(not repeated, self, "adapters names one of them twice")
        self.source_methods()

    @abstractmethod
    def mix(self, modules: Sequence[nn.Module], placement: Placement) -> nn.Module:
        """The module of one place.

        Args:
            modules: what each adapter has there.
            placement: where the first of them acts.
        """

    def source_methods(self) -> list[Method]:
        """The methods of the adapters.

        Raises:
            ConfigurationError: `sources` is not what `attach` writes there.
        """
        classes = {kind.__name__: kind for kind in self.kinds}
        found = []
        for entry in self.sources or ():
            known = isinstance(entry.get("fields"), dict) and isinstance(entry.get("class"), str)
            require(known and entry["class"] in classes, self, f"sources are of {self.kinds_in_words()}, not {entry!r}")
            cls = classes[entry["class"]]
            types, fields = get_type_hints(cls), {**cls.written_without, **entry["fields"]}
            try:
                found.append(cls(**{name: from_json(value, types.get(name)) for name, value in fields.items()}))
            except TypeError as error:  # a field that this version does not have
                raise ConfigurationError(f"{type(self).__name__}: {error}") from None
        return found

    def kinds_in_words(self) -> str:
        """The methods whose adapters it takes."""
        return " or ".join(kind.__name__ for kind in self.kinds)

    def over(self, methods: Mapping[str, Method]) -> "OverAdapters":
        """The method that knows its sources, given the method of each adapter by its name.

        Raises:
            ConfigurationError: one is of another method.
        """
        for name, method in methods.items():
            sentence = f"it takes adapters of {self.kinds_in_words()}, but {name!r} is {type(method).__name__}"
            require(isinstance(method, self.kinds), self, sentence)
        towers = {name: None if m.towers is None else sorted({*_listed(m.towers)}) for name, m in methods.items()}
        same = all(each == next(iter(towers.values())) for each in towers.values())
        require(same, self, f"the adapters act on different towers ({towers})")
        own = self.towers is None or sorted({*_listed(self.towers)}) == next(iter(towers.values()))
        require(own, self, "towers are those of its adapters; leave them out")
        described = [describe_method(method) for method in methods.values()]
        return dataclasses.replace(self, adapters=(), sources=described, towers=next(iter(methods.values())).towers)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """What `mix` makes, wherever the adapters act."""
        methods = self.source_methods()
        require(len(methods) > 0, self, "it needs trained adapters; name those that are attached (adapters=)")
        by_source = [sorted(method.place(tower), key=_place_of) for method in methods]
        places = [[_place_of(placement) for placement in found] for found in by_source]
        if any(each != places[0] for each in places):
            raise ConfigurationError(
                f"{type(self).__name__}: its adapters act at different places ({_in_words(places)}); train them alike"
            )
        for together in zip(*by_source, strict=True):
            first = together[0]
            yield dataclasses.replace(first, module=self.mix([placement.module for placement in together], first))


def _place_of(placement: Placement) -> tuple[int, str, str]:
    return -1 if placement.block is None else placement.block, placement.site, placement.add or ""


def _in_words(places: Sequence[Sequence[tuple]]) -> str:
    """The first place at which not all act."""
    every = [set(each) for each in places]
    block, site, _ = min(set.union(*every) - set.intersection(*every))
    return f"not all at {site}" + ("" if block < 0 else f" of block {block}")


def _listed(towers: str | list[str]) -> list[str]:
    return [towers] if isinstance(towers, str) else list(towers)


def weighted(outputs: Sequence[torch.Tensor], shares: torch.Tensor) -> torch.Tensor:
    """sum_n p_n z_n (..., width) of outputs z_n (..., width) with shares p (..., number)."""
    return sum(share[..., None] * output for share, output in zip(shares.unbind(-1), outputs, strict=True))
