"""Layers with sites: the library's own classes of layers, with what acts on their input and output mixed in."""

import functools
from collections.abc import Callable

import torch
import torch.nn as nn

from visionpeft.errors import UnsupportedError
from visionpeft.sites import frozen_layers


class SitedLayer:
    """Mixed into the class of a layer that is called (linear, convolution, normalisation): each module of `entering`
    maps its input, y = layer(x), then each module of `acting` maps (x, y, weight, bias) to the next y.
    """

    original: type[nn.Module]  # the library's class of the layer
    acting: tuple[nn.Module, ...] = ()
    entering: tuple[nn.Module, ...] = ()

    def forward(
        self, x: torch.Tensor, changed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Compute the layer and what acts on its input and output; this call gives `changed(x, y)` of that.

        Where several sites are rows of one layer, the module that calls it knows what acts there: so a hook on the
        layer sees that, too.
        """
        for module in self.entering:
            x = module(x)
        y, acting = self.economical(x)
        bias = getattr(self, "bias", None)
        for module in acting:
            y = module(x, y, self.weight, bias)
        return y if changed is None else changed(x, y)

    def economical(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[nn.Module, ...]]:
        """The layer's output, with as much of what acts as is cheaper together with it, and what is left to act."""
        return super().forward(x), self.acting

    def __reduce_ex__(self, protocol):
        # The class is made on demand, so it is pickled as the class it was made from.
        original = self.original
        return _empty_sited_layer, (original,), self.__dict__


class SitedLinear(SitedLayer):
    """A linear layer."""

    idle_forward = nn.Linear.forward  # what it computes where nothing acts

    def economical(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[nn.Module, ...]]:
        """Leave out what `frozen_layers.linear` does."""
        y, ((_, acting),) = frozen_layers.linear(x, self.weight, self.bias, [(None, self.acting)])
        return y, acting


class SitedPointwise(SitedLayer):
    """A normalisation or activation: cheap to run again."""

    def economical(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[nn.Module, ...]]:
        """Leave out what can act as another weight and bias, and remember what the output is made from."""
        if frozen_layers.traced():
            return super().economical(x)
        # by attribute, as a trained copy may be read instead of the layer's own
        parameters = {name: getattr(self, name) for name in self._parameters}
        folded = self._folded() if self.acting else None
        if folded is not None:
            parameters = {"weight": folded[0], "bias": folded[1]}
        run = functools.partial(_run_with, self.original, self, tuple(parameters))
        y = run(x, *parameters.values())
        if not getattr(self, "inplace", False):
            y = frozen_layers.remember(y, run, x, *parameters.values())
        return y, (self.acting if folded is None else ())

    def _folded(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        weight, bias = self.weight, getattr(self, "bias", None)
        for module in self.acting:
            same = all(parameter.dtype == weight.dtype for parameter in _parameters_of(module))
            if bias is None or not (same and hasattr(module, "merge")):
                return None
            weight, bias = module.merge(weight, bias)
        return weight, bias


def _parameters_of(module) -> tuple[nn.Parameter, ...]:
    return tuple(module.parameters()) if isinstance(module, nn.Module) else ()


def _run_with(
    original: type[nn.Module], layer: nn.Module, names: tuple[str, ...], x: torch.Tensor, *values: torch.Tensor
) -> torch.Tensor:
    """What the library's layer computes with other parameters. It may no longer be sited when it is run again."""
    twin = original.__new__(original)
    twin.__dict__ = {**layer.__dict__, "_parameters": dict(zip(names, values, strict=True))}
    if getattr(layer, "inplace", False):
        twin.inplace = False  # x may be kept for the backward pass of what made it
    return original.forward(twin, x)


@functools.cache
def sited_layer_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class of a layer with `SitedLayer` mixed in."""
    if original.forward is nn.Linear.forward:
        mixed_in = SitedLinear
    elif issubclass(original, nn.Linear | nn.Conv2d):
        mixed_in = SitedLayer
    else:
        mixed_in = SitedPointwise
    return type(f"Sited{original.__name__}", (mixed_in, original), {"original": original})


def _empty_sited_layer(original: type[nn.Module]) -> nn.Module:
    cls = sited_layer_class(original)
    return cls.__new__(cls)


def give_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Let a module be of another class.

    Raises:
        UnsupportedError: Python lets no object of its class have another one, as where ABC is one of its first bases.
    """
    try:
        object.__setattr__(module, "__class__", kind)  # that of modules first asks whether it is a parameter
    except TypeError as error:
        own = type(module)
        raise UnsupportedError(
            f"nothing can act in a {own.__name__} of {own.__module__}, because Python lets no object of this class "
            "have another one; let its first base be the class of the library, and others follow"
        ) from error
