"""Lightning's callbacks that average weights, on a task whose backbone is frozen.

They average every tensor of the module, and Lightning gives no say in which. A frozen backbone would come out of that
changed: decay * w + (1 - decay) * w is w but for its rounding, tables of indices are truncated, and the causal mask of
a text tower, -inf, becomes NaN. So of a task the callbacks here see what is trained, and nothing else is written to.
"""

from collections.abc import Iterable

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

Averaging = WeightAveraging | StochasticWeightAveraging


def averaging_callbacks(callbacks: Iterable[pl.Callback]) -> list[Averaging]:
    """Those that average weights."""
    return [callback for callback in callbacks if isinstance(callback, Averaging)]


def average_trained_only(callbacks: Iterable[pl.Callback]) -> None:
    """Let the callbacks average what is trained, after they have copied the task in their `setup`."""
    for callback in averaging_callbacks(callbacks):
        if isinstance(callback, WeightAveraging):
            callback._average_model.__class__ = AverageOfTrained  # nothing public gives it another one
        else:
            callback.update_parameters = _of_trained(type(callback).update_parameters)
            callback.transfer_weights = _of_trained(type(callback).transfer_weights)


def copy_again(callbacks: Iterable[pl.Callback], trainer: pl.Trainer, task: pl.LightningModule) -> None:
    """Let the callbacks copy the task once more, whose tensors are others than when they were set up."""
    for callback in averaging_callbacks(callbacks):
        callback.setup(trainer, task, "fit")
    average_trained_only(callbacks)


class AverageOfTrained(AveragedModel):
    """torch's running average, of those tensors of a task that are trained and are not equal to their average.

    Buffers that are no floating-point numbers are copied; the others are averaged, or with `use_buffers=False` copied.
    """

    def update_parameters(self, model: nn.Module) -> None:
        """Take the present values into the average."""
        averaged, current = _Tensors(), _Tensors()
        for own, value in zip(_trained(self.module), _trained(model), strict=True):
            value = value.detach().to(own.device)
            if not own.is_floating_point():
                own.copy_(value)
            elif not torch.equal(own, value):
                averaged.add(own)
                current.add(nn.Parameter(value, requires_grad=False) if isinstance(own, nn.Parameter) else value)
        whole = self.module
        self.module = averaged
        try:
            super().update_parameters(current)
        finally:
            self.module = whole


class _Tensors(nn.Module):
    """Tensors that are a module's for torch's average."""

    def add(self, tensor: torch.Tensor) -> None:
        name = str(len(self._parameters) + len(self._buffers))
        if isinstance(tensor, nn.Parameter):
            self.register_parameter(name, tensor)
        else:
            self.register_buffer(name, tensor)


def _trained(task: pl.LightningModule) -> list[torch.Tensor]:
    """The tensors of a checkpoint, parameters first; frozen parameters of adapters are not among them."""
    keys = task.trained_keys()
    tensors = [tensor for key, tensor in task.state_dict(keep_vars=True).items() if key in keys]
    parameters = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter) and tensor.requires_grad]
    return parameters + [tensor.detach() for tensor in tensors if not isinstance(tensor, nn.Parameter)]


def _of_trained(function):
    """A function of two modules, on what is trained of them."""

    def of_trained(first: pl.LightningModule, second: pl.LightningModule, *more):
        return function(_parameters(first), _parameters(second), *more)

    return of_trained


def _parameters(task: pl.LightningModule) -> _Tensors:
    tensors = _Tensors()
    for tensor in _trained(task):
        if isinstance(tensor, nn.Parameter):
            tensors.add(tensor)
    return tensors
