"""Modules of several adapters that act as one: their tensors stacked once, and gathered by the rows of a batch."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.adapters.alike import OF_MODULES, Acts, definition
from visionpeft.sites import Located, OnPatches
from visionpeft.sites.frozen_layers import is_hooked
from visionpeft.sites.tensor_versions import version_of


class Together:
    """Modules that are `alike`, one of each adapter.

    Args:
        modules: the modules.
        owned: for each, the modules of its adapter.
    """

    def __init__(self, modules: Sequence[nn.Module], owned: Sequence[set[nn.Module]]):
        self.modules = tuple(modules)
        self.template = modules[0]
        self.rows_at_once = "by_row" in definition(self.template)
        self.padded = definition(self.template).get("padded", {}) if self.rows_at_once else {}
        self.parts = [list(_parts(module, each)) for module, each in zip(modules, owned, strict=True)]
        self.owned = owned[0]
        self.every = [part for parts in self.parts for part in parts]
        kinds = [kind for part in self.every for kind in (part._parameters, part._buffers)]
        self.sources = [(kind, name) for kind in kinds for name in kind]
        first = self.template.row_values() if self.rows_at_once else {}
        names = [name for name, value in first.items() if not isinstance(value, torch.Tensor)]
        self.numbers = [(module, name) for module in self.modules for name in names]
        # What was stacked of which tensors and numbers, and what came of it.
        self._kept: tuple[list, list, dict[str, torch.Tensor]] | None = None

    def let_go(self) -> None:
        """Keep nothing stacked, until it is needed again."""
        self._kept = None

    def hooked(self) -> bool:
        """Whether a hook watches the calls of one of the modules."""
        return any(map(is_hooked, self.every))

    def act(self, method: str, index: torch.Tensor | None, rows: int, inputs: tuple):
        """What a method of the modules gives, each for its rows.

        Args:
            method: "forward" or "join".
            index: for each sample the module that acts on it, or None if sample i is that of module i.
            rows: number of samples, of which each is as many consecutive rows of the inputs.
            inputs: those of the method.
        """
        if not self.rows_at_once and not self._values(0):  # the modules are equal
            return getattr(self.template, method)(*inputs)
        values = self.gathered(index)
        if self.rows_at_once and method == "forward":
            each = len(inputs[0]) // rows
            if each > 1:
                values = {name: value.repeat_interleave(each, 0) for name, value in values.items()}
            return self.template.by_row(values, *inputs)
        return self._mapped(method, values, rows, inputs)

    def gathered(self, index: torch.Tensor | None, missing: bool = False) -> dict[str, torch.Tensor]:
        """For each name, the values (rows, ...) of the module of each sample.

        Args:
            index: for each sample its module, or None if sample i is that of module i.
            missing: whether an index that is one too large stands for zeros.
        """
        stacked = self._stacked()
        if missing:
            stacked = {name: F.pad(value, (*(0, 0) * (value.ndim - 1), 0, 1)) for name, value in stacked.items()}
        if index is None:
            return stacked
        return {name: value.index_select(0, index) for name, value in stacked.items()}

    def _stacked(self) -> dict[str, torch.Tensor]:
        """The values (modules, ...) as they are now."""
        # With gradients each stack is part of the graph of this forward, and a step may follow that nobody counts.
        # Without, it is made once, and again after something was written, exchanged or moved. Aliases hold the memory
        # of the tensors, so that what is at the same place later is the same.
        if torch.is_grad_enabled():
            self._kept = None
            return self._stack([self._values(number) for number in range(len(self.modules))])
        kept = self._kept
        if kept is not None and _same(kept[0], self.sources, kept[1], self.numbers):
            return kept[2]
        stacked = self._stack([self._values(number) for number in range(len(self.modules))])
        tensors = [tensors[name] for tensors, name in self.sources]
        seen = [None if t is None or t.is_inference() else (t, t.detach(), *_state(t)) for t in tensors]
        # What does not count its versions is stacked each time.
        whole = all(each is not None or t is None for each, t in zip(seen, tensors, strict=True))
        self._kept = (seen, [getattr(m, name) for m, name in self.numbers], stacked) if whole else None
        return stacked

    def _values(self, number: int) -> dict[str, torch.Tensor | float]:
        if self.rows_at_once:
            return self.modules[number].row_values()
        found = {}
        for place, part in enumerate(self.parts[number]):
            for kind in (part._parameters, part._buffers):
                found |= {f"{place}.{name}": tensor for name, tensor in kind.items() if tensor is not None}
        return found

    def _stack(self, values: list[dict[str, torch.Tensor | float]]) -> dict[str, torch.Tensor]:
        like = next((value for value in values[0].values() if isinstance(value, torch.Tensor)), None)
        stacked = {}
        for name, first in values[0].items():
            each = [own[name] for own in values]
            if not isinstance(first, torch.Tensor):
                stacked[name] = torch.tensor(each, dtype=like.dtype, device=like.device)
                continue
            if name in self.padded:
                dimension = self.padded[name]
                most = max(value.shape[dimension] for value in each)
                further = first.ndim - 1 - dimension
                each = [
                    value
                    if value.shape[dimension] == most
                    else F.pad(value, (*(0, 0) * further, 0, most - value.shape[dimension]))
                    for value in each
                ]
            stacked[name] = torch.stack(each)
        return stacked

    def _mapped(self, method: str, values: dict[str, torch.Tensor], rows: int, inputs: tuple):
        """The method of one module, mapped over rows."""
        batched = 2 if len(inputs) == 4 else len(inputs)  # of a layer's input, output, weight and bias, the first two

        def of_row(values, own, others):
            twin = _with_values(self.template, dict(enumerate(self.parts[0])), values, self.owned)
            return getattr(twin, method)(*own, *others)

        own = [x for x in inputs[:batched] if isinstance(x, torch.Tensor)]
        others = inputs[len(own) :]
        own = [x.unflatten(0, (rows, -1)) for x in own]
        result = torch.vmap(of_row, in_dims=(0, 0, None), randomness="different")(values, own, others)
        if isinstance(result, tuple):
            return tuple(each.flatten(0, 1) for each in result)
        return result.flatten(0, 1)


def _same(seen: list, sources: list, numbers: list, owners: list) -> bool:
    """Whether nothing was written, exchanged or moved."""
    for before, (tensors, name) in zip(seen, sources, strict=True):
        now = tensors.get(name)
        if (now is None) is not (before is None):
            return False
        if before is not None and (now is not before[0] or _state(now) != before[2:]):
            return False
    return numbers == [getattr(module, name) for module, name in owners]


def _state(tensor: torch.Tensor) -> tuple:
    return version_of(tensor), tensor.untyped_storage()._cdata, tensor.dtype


def _parts(module: nn.Module, owned: set[nn.Module]) -> Iterator[nn.Module]:
    """The modules whose tensors a module computes with, but for those of the backbone; itself first."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _parts(child, owned)
    for name, value in sorted(vars(module).items()):
        if isinstance(value, tuple) and name not in OF_MODULES:
            for each in value:
                if isinstance(each, nn.Module) and each in owned:
                    yield from _parts(each, owned)


def _with_values(
    module: nn.Module, parts: dict[int, nn.Module], values: dict[str, torch.Tensor], owned: set[nn.Module]
) -> nn.Module:
    """A module like this one that computes with other tensors; this one stays as it is, for other threads."""
    numbers = iter(parts)

    def twin_of(module: nn.Module) -> nn.Module:
        place = next(numbers)  # in the order of `_parts`
        twin = type(module).__new__(type(module))
        own = dict(vars(module))
        for kind in ("_parameters", "_buffers"):
            own[kind] = {name: values.get(f"{place}.{name}") for name in own[kind]}
        own["_modules"] = {name: child and twin_of(child) for name, child in own["_modules"].items()}
        for name, value in sorted(vars(module).items()):
            if isinstance(value, tuple) and name not in OF_MODULES:
                own[name] = tuple(
                    twin_of(each) if isinstance(each, nn.Module) and each in owned else each for each in value
                )
        twin.__dict__ = own
        return twin

    return twin_of(module)


class OnRows:
    """Lets modules that act together be called like one of them.

    Args:
        together: the modules.
        index: for each sample its module, or None if sample i is that of module i.
        rows: number of samples.
    """

    def __init__(self, together: Together, index: torch.Tensor | None, rows: int):
        self.together, self.index, self.rows = together, index, rows

    def __call__(self, *inputs):
        """What `forward` of the modules gives."""
        return self.together.act("forward", self.index, self.rows, inputs)

    @property
    def reads_attention_input(self) -> bool:
        """Whether the modules do."""
        return getattr(self.together.template, "reads_attention_input", False)

    @property
    def reads_grid(self) -> bool:
        """Whether the modules do."""
        return getattr(self.together.template, "reads_grid", False)


class JoiningOnRows(OnRows):
    """Likewise for modules with a `join`."""

    def join(self, *inputs):
        """What `join` of the modules gives."""
        return self.together.act("join", self.index, self.rows, inputs)


def on_rows(acts: Acts, together: Together, index: torch.Tensor | None, rows: int) -> Callable:
    """What acts in the place of one of the modules."""
    if isinstance(acts, OnPatches | Located):
        return type(acts)(on_rows(acts.module, together, index, rows), acts.first)
    return (JoiningOnRows if hasattr(acts, "join") else OnRows)(together, index, rows)
