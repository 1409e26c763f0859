"""Modules that compute with what an adapter holds, while their own tensors stay where they are, under their own names.

A head and a parameter that an adapter trains are copies below `model.peft`. The model's own module keeps its own
tensors, so that every tensor is in `state_dict()` and `named_parameters()` once: while the adapter acts, the module has
a class that reads the copy. It asks for the copy at each use, by the module that holds it. So whatever exchanges the
tensors of that module (`torch.func.functional_call`, `load_state_dict(assign=True)`) exchanges what computes.
"""

import functools

import torch
from torch import nn

from visionpeft.errors import UnsupportedError
from visionpeft.sites.frozen_layers import own
from visionpeft.sites.layers import SitedLayer, sited_layer_class

# What says which layer a head is, besides its tensors.
SIZES = ("in_features", "out_features", "num_features", "normalized_shape")


class StandIn(nn.Module):
    """Mixed into the class of a module of the model while an adapter's tensors are used instead of its own."""

    below: type[nn.Module]  # its class otherwise
    arguments: tuple[str, ...]  # the parameters and attributes that are read from elsewhere

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Give the module another tensor of its own, which must fit the copy that is trained.

        Raises:
            UnsupportedError: it has another shape, as after `set_input_size`, or is what `torch.nn.utils.prune` keeps
                of one that is read from elsewhere.
        """
        before, stem = self._parameters.get(name), name.removesuffix("_orig")
        if stem != name and stem in self.arguments:
            self._parameters.setdefault(stem, param)  # where it was taken out before this was asked for
            self._refuse_to_exchange(stem)
        if before is not None and (param is None or param.shape != before.shape):
            raise UnsupportedError(
                f"{name} of {type(self).__name__} cannot change its shape from {tuple(before.shape)}: an adapter "
                "trains a copy of it; detach the adapters, change the model and attach them again"
            )
        super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        if name in self.arguments:  # as `torch.nn.utils.parametrize` begins
            self._refuse_to_exchange(name)
        super().__delattr__(name)

    def _refuse_to_exchange(self, name: str) -> None:
        raise UnsupportedError(
            f"{name} of {type(self).__name__} cannot be pruned or parametrised while an adapter acts in its place; "
            "detach the adapters first, or let it act on what is trained below model.peft"
        )

    def __reduce_ex__(self, protocol):
        # The class is made on demand, so what is pickled is how to make it.
        return _empty, recipe(type(self)), self.__dict__


class ReadsCopies(StandIn):
    """A module some of whose parameters are read from `copies`: name -> (module with the copy, its name there)."""

    copies: dict[str, tuple[nn.Module, str]]


class UsesHead(StandIn):
    """A head that computes with another one, the only entry of `acting`."""

    acting: tuple[nn.Module]  # in a tuple, so that it is not registered here as well

    def forward(self, x: torch.Tensor | list[torch.Tensor], *more):
        """Map pooled features (batch, width), or maps and what else the other head takes, to what that gives."""
        # Trained, a linear layer keeps its input, which must not keep the tokens it was taken from.
        return in_own_precision(self.acting[0], own(x) if isinstance(self.acting[0], nn.Linear) else x, *more)


def acting_head(head: nn.Module) -> nn.Module:
    """The head that computes: that of an adapter, where it stands in for the model's own."""
    return head.acting[0] if isinstance(head, UsesHead) else head


def in_own_precision(head: nn.Module, x: torch.Tensor | list[torch.Tensor], *more):
    """head(x) computed in the precision of the head, a tensor in the dtype of x; autocast chooses where it is on."""
    own = x[0] if isinstance(x, list) else x  # the maps of several stages, which are alike
    dtype = next((t.dtype for t in (*head.parameters(), *head.buffers()) if t.is_floating_point()), own.dtype)
    if dtype == own.dtype or torch.is_autocast_enabled(own.device.type):
        return head(x, *more)
    given = head([each.to(dtype) for each in x] if isinstance(x, list) else x.to(dtype), *more)
    return given.to(own.dtype) if isinstance(given, torch.Tensor) else given


def is_sharded(tensor: torch.Tensor | None) -> bool:
    """Whether FSDP holds a part of a tensor here. It then asks modules for their own tensors by attribute."""
    return type(tensor).__name__ == "DTensor"


@functools.cache
def reads_copies(below: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class of a module that reads these of its parameters from `copies`."""

    changes = hasattr(below, "changed_value")  # modules that change weights act on the trained ones

    def copied(name: str) -> property:
        def read(self):
            holder, key = self.copies[name]
            value, mine = getattr(holder, key), self._parameters.get(name)
            if mine is None:
                raise UnsupportedError(
                    f"{name} of {type(self).__name__} was parametrised while an adapter trains a copy of it; detach "
                    "the adapters first"
                )
            if is_sharded(mine):
                return mine
            value = value if value.dtype == mine.dtype else value.to(mine.dtype)
            return self.changed_value(name, value) if changes else value

        return property(read)

    properties = {name: copied(name) for name in names}
    if "pos_embed" in names and hasattr(below, "set_input_size"):
        properties["set_input_size"] = _refuse_input_size  # before it has changed the half of the model
    return made(reads_copies, ReadsCopies, below, names, properties)


@functools.cache
def uses_head(below: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class of a head that computes with another one, and has these attributes of it."""

    def of_head(name: str) -> property:
        def read(self):
            mine = self._parameters.get(name)
            return mine if is_sharded(mine) else getattr(self.acting[0], name)

        return property(read)

    return made(uses_head, UsesHead, below, names, {name: of_head(name) for name in names})


def attributes_of(head: nn.Module) -> tuple[str, ...]:
    """The attributes of a head that are seen at the module it stands in for."""
    return (*head._parameters, *(name for name in SIZES if name in vars(head)))


def class_below(module: nn.Module) -> type[nn.Module]:
    """The class of a module without what is mixed in here, or for routes."""
    kind = getattr(type(module), "unrouted", type(module))
    return kind.below if issubclass(kind, StandIn) else kind


def _refuse_input_size(self, *args, **kwargs) -> None:
    raise UnsupportedError(
        "set_input_size cannot be used while an adapter trains pos_embed; detach the adapters, set the input size and "
        "attach them again"
    )


def made(make, mixed_in: type[StandIn], below: type[nn.Module], names: tuple[str, ...], properties: dict) -> type:
    """A class with `mixed_in` and these properties above another class, made by `make(below, names)`."""
    about = {"below": below, "make": staticmethod(make), "arguments": names}
    about |= {key: getattr(below, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(below.__name__, (mixed_in, below), {**about, **properties})


def recipe(kind: type[nn.Module]) -> tuple:
    """How a class of a module is made: the library's own, and then what was mixed in, with its names."""
    if issubclass(kind, StandIn):
        return (*recipe(kind.below), (kind.make, kind.arguments))
    return ((kind.original, True) if issubclass(kind, SitedLayer) else (kind, False),)


def _empty(start: tuple[type[nn.Module], bool], *mixed_in: tuple) -> nn.Module:
    original, sited = start
    cls = sited_layer_class(original) if sited else original
    for make, names in mixed_in:
        cls = make(cls, names)
    return cls.__new__(cls)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The library's class of a module, whatever is mixed in."""
    return recipe(getattr(type(module), "unrouted", type(module)))[0][0]
