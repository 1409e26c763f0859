"""What some methods do while they are trained, besides having gradients: add to the loss, act after a step.

The tasks do it by themselves. In a training loop of your own:

    logits = model(images)
    loss = criterion(logits, labels) + visionpeft.penalty(model, logits, again=lambda: model(images))
    loss.backward()
    optimizer.step()
    visionpeft.after_step(model, step, total_steps)
    optimizer.zero_grad()
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from visionpeft.adapters.access import on_model
from visionpeft.adapters.adapters import attached
from visionpeft.errors import ConfigurationError
from visionpeft.methods.parts.base import Method


@on_model
def penalty(
    model: nn.Module, logits: torch.Tensor | None = None, again: Callable[[], torch.Tensor] | None = None
) -> torch.Tensor | float:
    """What the methods of the active adapters add to the loss, such as AdaLoRA's orthogonality; 0 if nothing.

    Args:
        model: a model with adapters, after its forward pass.
        logits: what the pass has given, (batch, classes); for methods that compare two passes, such as `AdaMix`.
        again: gives the logits of another pass of the same batch; called once, and only if such a method acts.

    Raises:
        ConfigurationError: a method compares two passes, and `logits` or `again` is missing.
    """
    total = sum(method.penalty(part) for method, part in acting(model))
    comparing = [method for method, _ in acting(model) if method.compares_passes]
    if not comparing:
        return total
    if logits is None or again is None:
        raise ConfigurationError(
            f"{type(comparing[0]).__name__} compares two passes of the same batch: call "
            "penalty(model, logits, again=lambda: model(images))"
        )
    second = again()
    return total + sum(method.compare_passes(logits, second) for method in comparing)


@on_model
@torch.no_grad()
def after_step(model: nn.Module, step: int, total_steps: int) -> None:
    """Let the methods of the active adapters act after an optimiser step, while its gradients are still there.

    Args:
        model: a model with adapters.
        step: number of steps made, this one included: 1 after the first.
        total_steps: steps of the whole training.

    Raises:
        ConfigurationError: a step outside the training, or gradients that are gone already.
    """
    if not 1 <= step <= total_steps:
        raise ConfigurationError(f"after_step: step {step} is none of the steps 1 to {total_steps} of the training")
    for method, part in acting(model):
        method.after_step(part, step, total_steps)


def acting(model: nn.Module) -> Iterator[tuple[Method, nn.Module]]:
    """Methods of the active adapters with their modules."""
    peft = attached(model)
    for name in peft.active:
        adapter = peft[name]
        for key, method in zip(adapter.method_keys, adapter.methods, strict=True):
            yield method, adapter._modules.get(key, nn.ModuleDict())
