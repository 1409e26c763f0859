"""Layers of any kind that compute with changed weights, and normalisations that keep their statistics.

A layer whose own forward is unknown (a convolution that pads or standardises, a normalisation with its activation) or
whose weight is read without a call has no output at which a change of the weight could act. Here its attributes
`weight` and `bias` give what the modules that act make of them, by `merge(weight, bias) -> weight, bias`; whoever reads
them computes with it, and merging is exact by definition. The whole gradient of the weight is formed, which the
changes of outputs in `frozen_layers` avoid.
"""

import functools

import torch
from torch import nn

from visionpeft.sites.layers import SitedLayer
from visionpeft.sites.stand_ins import StandIn, is_sharded, made

CHANGED = ("weight", "bias")


class ChangesWeights(StandIn):
    """A layer that is read as the modules of `acting` change it, one after another."""

    acting: tuple[nn.Module, ...] = ()

    def changed_value(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The weight or bias that is read instead of this one, of the same shape and precision."""
        if is_sharded(value) or name not in CHANGED:  # a norm with a third tensor, trained beside a changed bias
            return value
        other = self._parameters.get("bias" if name == "weight" else "weight")
        pair = {name: value, ("bias" if name == "weight" else "weight"): other}
        # Summed in the precision of the adapters and rounded once, as when it is merged.
        wide = {key: None if each is None else _wide(each) for key, each in pair.items()}
        shape = value.shape
        with torch.autocast(value.device.type, enabled=False):
            weight, bias = wide["weight"].flatten(1) if wide["weight"].ndim > 2 else wide["weight"], wide["bias"]
            for module in self.acting:
                weight, bias = module.merge(weight, bias)
        return (weight if name == "weight" else bias).view(shape).to(value.dtype)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@functools.cache
def changes_weights(below: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class of a layer whose parameters of these names, of `CHANGED`, are read as what acts changes them."""

    def changed(name: str) -> property:
        return property(lambda self: self.changed_value(name, self._parameters[name]))

    return made(changes_weights, ChangesWeights, below, names, {name: changed(name) for name in names})


class KeepsStatistics(StandIn):
    """A normalisation that computes with its stored statistics in training, too, and does not write to them."""

    def reset_running_stats(self) -> None:
        """Nothing: the statistics are the backbone's.

        `torch.optim.swa_utils.update_bn` resets them and counts on batches in training to fill them again.
        """


@functools.cache
def keeps_statistics(below: type[nn.Module], names: tuple[str, ...] = ()) -> type[nn.Module]:
    """The class of a normalisation for which `training` is always False; what it is set to comes back afterwards."""

    def store(self, mode: bool) -> None:
        self.__dict__["training"] = mode

    return made(keeps_statistics, KeepsStatistics, below, names, {"training": property(lambda self: False, store)})


def has_statistics(module: nn.Module) -> bool:
    """Whether a module stores the statistics of the batches it has seen in training."""
    return module._buffers.get("running_mean") is not None and not isinstance(module, SitedLayer)
