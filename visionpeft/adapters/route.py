"""One adapter per sample: which rows of a batch go to which adapters, and which of them act together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn as nn

from visionpeft.adapters.alike import Acts, alike_heads
from visionpeft.adapters.together import Together, on_rows
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.sites import Located, OnPatches
from visionpeft.sites.frozen_layers import traced

# (tower, block, site, where the result is added)
Key = tuple[str, int | None, str, str | None]


@dataclass
class RoutedAdapter:
    """An adapter as routes know it.

    Args:
        root: the adapter.
        inserted: how many tokens or keys it inserts or removes at each site.
        chains: what acts at each site, in order.
        alike: for each site, what has to be the same in adapters that act together there; None for those that do not.
        owned: its modules.
        key_prompts: by tower and block, the modules whose prompts are keys and values alone and no tokens; their
            chains are those of the site "prompts".
    """

    root: nn.Module
    inserted: frozenset[tuple[Key, int]]
    chains: dict[Key, tuple[Acts, ...]]
    alike: dict[Key, tuple]
    owned: set[nn.Module]
    key_prompts: dict[tuple[str, int], list[nn.Module]]


@dataclass
class Group:
    """Adapters that act together at a site.

    Args:
        names: the adapters.
        chains: for each of them, what acts, in order.
        together: for each place in that order, the modules of all of them; none for one adapter.
        rows: for a device, the samples that they serve, None for all in order; and for each of these samples the
            number of its adapter, None if sample i is that of adapter i.
    """

    names: tuple[str, ...]
    chains: list[tuple[Acts, ...]]
    together: tuple[Together, ...]
    rows: Callable[[torch.device], tuple[torch.Tensor | None, torch.Tensor | None]]

    def acting(self, index: torch.Tensor | None, rows: int) -> list[Callable]:
        """What acts, in order, on the rows of so many samples."""
        if not self.together:
            return list(self.chains[0])
        return [on_rows(acts, each, index, rows) for acts, each in zip(self.chains[0], self.together, strict=True)]


class Route:
    """Which samples of a batch go to which adapter.

    Args:
        names: the adapter of each sample, or None for the plain backbone.
        adapters: the adapters by name.
        plan: key of the plan by which modules look up what they compute with.
    """

    def __init__(self, names: tuple[str | None, ...], adapters: dict[str, RoutedAdapter], plan: int):
        self.names = names
        self.adapters = adapters
        self.plan = plan
        self.samples: dict[str | None, list[int]] = {}
        for sample, name in enumerate(names):
            self.samples.setdefault(name, []).append(sample)
        self._groups: dict[tuple, list[Group]] = {}
        self._rows: dict[tuple, tuple[torch.Tensor | None, torch.Tensor | None]] = {}
        self._heads: dict[str, list[Group]] = {}

    def groups(self, key: Key) -> list[Group]:
        """The adapters that act at a site, those together that can."""
        apart = traced()
        groups = self._groups.get((key, apart))
        if groups is None:
            groups = self._groups[key, apart] = self._grouped(key, apart)
        if not apart and any(together.hooked() for group in groups for together in group.together):
            return self._grouped(key, True)
        return groups

    def _grouped(self, key: Key, apart: bool) -> list[Group]:
        found: dict[tuple, list[str]] = {}
        for name, adapter in self.adapters.items():
            if key in adapter.chains:
                same = None if apart else adapter.alike[key]
                found.setdefault((name,) if same is None else (None, same), []).append(name)
        return [self._group(names, [self.adapters[name].chains[key] for name in names]) for names in found.values()]

    def _group(self, names: Sequence[str | None], chains: list[tuple[Acts, ...]]) -> Group:
        together = ()
        if len(names) > 1 and chains[0][0] is not None:
            owned = [self.adapters[name].owned for name in names]
            together = tuple(Together([inner(acts) for acts in place], owned) for place in zip(*chains, strict=True))
        names = tuple(names)
        return Group(names, chains, together, lambda device: self.rows(names, device))

    def heads(self, path: str) -> list[Group]:
        """The heads for the samples, those together that can; None in the place of the model's own."""
        groups = self._heads.get(path)
        if groups is None:
            found: dict[tuple, list[str | None]] = {}
            for name in self.samples:
                head = self.head_of(name, path)
                same = None if head is None or traced() else alike_heads(head)
                alone = ("own",) if head is None else (name,)
                found.setdefault(alone if same is None else (None, same), []).append(name)
            groups = [self._group(names, [(self.head_of(name, path),) for name in names]) for names in found.values()]
            if not traced():
                self._heads[path] = groups
        return groups

    def head_of(self, name: str | None, path: str) -> nn.Module | None:
        """The head of an adapter, or None for the model's own."""
        root = None if name is None else self.adapters[name].root
        return root.get_submodule(path) if root is not None and path in root.head_paths else None

    def rows(self, names: tuple, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The samples that these adapters serve, and the number of the adapter of each; see `Group.rows`."""
        found = self._rows.get((names, device))
        if found is None:
            number = {name: index for index, name in enumerate(names)}
            samples = [sample for sample, name in enumerate(self.names) if name in number]
            members = [number[self.names[sample]] for sample in samples]
            everything = len(samples) == len(self.names)
            one_each = members == list(range(len(names)))
            found = (
                None if everything else _index(samples, device),
                None if one_each else _index(members, device),
            )
            if not traced():  # of an export it is no tensor that a later pass could use
                self._rows[names, device] = found
        return found

    def members(self, names: tuple, device: torch.device) -> torch.Tensor:
        """For each sample of the batch the number of its adapter, or one more than there are."""
        key = (names, device, "all")
        found = self._rows.get(key)
        if found is None:
            number = {name: index for index, name in enumerate(names)}
            found = _index([number.get(name, len(names)) for name in self.names], device)
            if not traced():
                self._rows[key] = found
        return found

    def let_go(self) -> None:
        """Keep nothing stacked."""
        for groups in (*self._groups.values(), *self._heads.values()):
            for together in (each for group in groups for each in group.together):
                together.let_go()

    def check(self, samples: int) -> None:
        """Refuse a batch of another size, and a trace by TorchScript.

        Raises:
            ConfigurationError: naming both sizes.
            UnsupportedError: it is traced, and samples go to several adapters.
        """
        if torch.jit.is_tracing() and len(self.samples) > 1:
            # To a batch of another size a trace would give rows that no adapter has acted on, without a word.
            raise UnsupportedError(
                "torch.jit.trace, and torch.onnx.export with dynamo=False, would keep which sample goes to which "
                "adapter and refuse no batch of another size; use torch.export, which does, or trace with one active "
                "adapter"
            )
        if samples != len(self.names):
            raise ConfigurationError(
                f"route names an adapter for each of {len(self.names)} samples, but the batch has {samples}"
            )


@dataclass
class Opened:
    """A route that is open in some context; see `sites.routing.Opened`."""

    route: Route
    trains: bool = False
    differentiated: bool = False
    refusal: str | None = None
    names: tuple[str | None, ...] = field(init=False)

    def __post_init__(self):
        self.names = self.route.names

    @property
    def plan(self) -> int:
        """Key of the plan of the route."""
        return self.route.plan


def _index(numbers: list[int], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # a route that is first used without gradients may serve a batch with them
        return torch.tensor(numbers, device=device)


def inner(acts: Acts) -> nn.Module:
    """What acts, without that some tokens are treated apart."""
    return acts.module if isinstance(acts, OnPatches | Located) else acts
