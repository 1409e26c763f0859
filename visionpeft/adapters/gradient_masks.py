"""Mask gradients once for each step of an optimiser, whoever calls it, for methods such as Child-Tuning F.

The mask is drawn where the published code draws it: inside the step, so after all backward passes whose gradients were
accumulated, after the processes' gradients were averaged, and after clipping. A hook on the steps of all optimisers
does it, and touches only parameters that such a method trains; a training loop need not know of it.
"""

import functools
import weakref

import torch
import torch.distributed as dist
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

_adapters: weakref.WeakSet = weakref.WeakSet()  # those with `masked`, parameter name -> method


def mask_at_steps(adapter: torch.nn.Module) -> None:
    """Mask the gradients of an adapter's `masked` parameters from the next step of an optimiser on."""
    _follow_optimisers()
    _adapters.add(adapter)


@functools.cache  # once for the process
def _follow_optimisers() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        _mask(optimizer)
        return None

    # The gradients are made within the step, by the closure: that is how Lightning calls its optimisers.
    def closure_and_mask():
        loss = closure()
        _mask(optimizer)
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure_and_mask}
    return (args[0], closure_and_mask, *args[2:]), kwargs


@torch.no_grad()
def _mask(optimizer: Optimizer) -> None:
    methods = {id(a.get_parameter(name)): method for a in _adapters for name, method in a.masked.items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    chosen = [p for p in parameters if id(p) in methods and p.grad is not None]
    if not chosen:
        return
    seed = _common_seed(chosen[0].device)
    generators = {device: torch.Generator(device).manual_seed(seed) for device in {p.grad.device for p in chosen}}
    for parameter in chosen:
        # Of a sharded gradient, each process masks its own part.
        local = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
        local.copy_(methods[id(parameter)].mask_gradient(local, generators[local.device]))


def _common_seed(device: torch.device) -> int:
    """A number drawn from torch's generator, the same in all processes: their copies of a parameter must stay equal."""
    seed = torch.randint(2**62, (1,))
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        seed = seed.to(device)
        dist.broadcast(seed, src=0)
    return int(seed)
