"""Optimiser and learning-rate schedule of what is trained: adapters, head and extra parameters."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_type_hints

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from visionpeft.errors import ConfigurationError
from visionpeft.methods.parts.field_types import checked_field
from visionpeft.tasks.steps import Steps


@dataclass(frozen=True)
class Optimisation:
    """How the trained parameters are updated.

    Args:
        optimizer: "adamw", or "sgd" with momentum 0.9.
        lr: learning rate of the adapter or learner.
        head_lr: learning rate of the head; None uses `lr`.
        weight_decay: decay of tensors with two or more dimensions; biases, scales and norms are not decayed.
        decay_all: decay biases, scales and norms as well.
        decay_biases: decay biases and scales as well, but not norms of the backbone, as AIM's authors do.
        schedule: "cosine", which warms up linearly and changes with every step; or "epoch_cosine" of prompt learning,
            `warmup_lr` while warming up, then 0.5 lr (1 + cos(pi (epoch - warmup_epochs) / epochs)), which changes
            with every epoch; or "cosine_by_epoch" of mmcv, 0.5 lr (1 + cos(pi epoch / epochs)), which changes with
            every epoch, times a rise from `warmup_ratio` to 1 with every step of the warm-up.
        warmup_epochs: epochs over which the rate rises linearly to its peak; may be a fraction.
        warmup_lr: the constant rate while "epoch_cosine" warms up.
        warmup_ratio: where "cosine_by_epoch" begins to rise.
        min_lr_ratio: the rate at the end of "cosine", as a share of the peak.
        eps: the term of AdamW that keeps it from dividing by zero.
        lora_plus: the rate of LoRA's B as a multiple of `lr`, 2 to 32 in LoRA+; so that of P in AdaLoRA and b in VeRA.
        layer_decay: multiply the rates by layer_decay ** n, n layers from the output: 0 for the head, 1 for the last
            block, L for the first of L; 1 leaves them (Bao et al., BEiT, 2021, https://arxiv.org/abs/2106.08254).
        scale_lr_by_batch: multiply the rates by batch size / this number, 256 in many papers; None leaves them.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    head_lr: float | None = None
    weight_decay: float = 1e-4
    decay_all: bool = False
    schedule: Literal["cosine", "epoch_cosine", "cosine_by_epoch"] = "cosine"
    warmup_epochs: float = 10
    warmup_lr: float = 1e-5
    min_lr_ratio: float = 0.0
    eps: float = 1e-8
    lora_plus: float = 1.0
    layer_decay: float = 1.0
    scale_lr_by_batch: int | None = None
    decay_biases: bool = False
    warmup_ratio: float = 0.1

    def __post_init__(self):
        """Refuse values no optimiser takes, numbers that are none or have no end among them."""
        types = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            checked_field(self, field, types[field.name])
        if min(self.lr, self.head_lr or 0, self.weight_decay, self.warmup_lr) < 0:
            raise ConfigurationError("optimisation: lr, head_lr, warmup_lr and weight_decay must not be negative")
        if self.eps <= 0 or self.lora_plus <= 0:
            raise ConfigurationError("optimisation: eps and lora_plus must be positive")
        if not 0 < self.layer_decay <= 1:
            raise ConfigurationError(f"optimisation: layer_decay lies in (0, 1], not {self.layer_decay}")
        if self.warmup_epochs < 0 or not 0 <= self.min_lr_ratio <= 1:
            raise ConfigurationError("optimisation: warmup_epochs must not be negative, min_lr_ratio lies in [0, 1]")
        if not 0 <= self.warmup_ratio <= 1:
            raise ConfigurationError(f"optimisation: warmup_ratio lies in [0, 1], not {self.warmup_ratio}")
        if self.scale_lr_by_batch is not None and self.scale_lr_by_batch <= 0:
            raise ConfigurationError("optimisation: scale_lr_by_batch must be positive")


def output_side(module: nn.Module) -> list[nn.Parameter]:
    """The factors of low-rank changes that are next to the output, such as LoRA's B."""
    return [getattr(each, name) for each in module.modules() for name in getattr(each, "output_side", ())]


def parameter_groups(
    trainable: Iterable[nn.Parameter],
    head: Iterable[nn.Parameter],
    optimisation: Optimisation,
    batch_size: int,
    output_side: Iterable[nn.Parameter] = (),
    distances: Mapping[nn.Parameter, int] | None = None,
    norms: Iterable[nn.Parameter] = (),
) -> list[dict]:
    """Split parameters into adapter and head, each with and without decay; empty groups are left out.

    With `lora_plus` the output side has groups of its own, whose rate is that of the adapter times `lora_plus`. Source:
    Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models, 2024, https://arxiv.org/abs/2402.12354.

    Args:
        trainable: everything that is trained.
        head: those of them that belong to the head.
        optimisation: rates and decay.
        batch_size: samples per optimiser step, for `scale_lr_by_batch`.
        output_side: those of them that `lora_plus` is about.
        distances: how many layers from the output each acts, for `layer_decay`; each distance has groups of its own.
        norms: those of them that `decay_biases` leaves out.

    Raises:
        ConfigurationError: `lora_plus` or `layer_decay` without anything it is about.
    """
    trainable = list(trainable)
    scale = batch_size / optimisation.scale_lr_by_batch if optimisation.scale_lr_by_batch else 1.0
    lr = optimisation.lr
    rates = {
        "adapter": lr,
        "output side": lr * optimisation.lora_plus,
        "head": lr if optimisation.head_lr is None else optimisation.head_lr,
    }
    parts = dict.fromkeys((id(parameter) for parameter in head), "head")
    if optimisation.lora_plus != 1:
        parts |= dict.fromkeys((id(parameter) for parameter in output_side), "output side")
        if not any(parts.get(id(parameter)) == "output side" for parameter in trainable):
            raise ConfigurationError(
                "optimisation: lora_plus is about the rate of LoRA's B and the like, which this method does not have; "
                "leave it at 1"
            )
    if optimisation.layer_decay != 1 and not distances:
        raise ConfigurationError(
            "optimisation: layer_decay is about adapters in the blocks of a backbone, which are not trained here; "
            "leave it at 1"
        )
    spared = {id(parameter) for parameter in norms}
    groups = {}
    for parameter in trainable:
        part = parts.get(id(parameter), "adapter")
        biases_decay = optimisation.decay_biases and id(parameter) not in spared
        decays = parameter.ndim > 1 or optimisation.decay_all or biases_decay
        distance = distances[parameter] if optimisation.layer_decay != 1 else 0
        group = groups.setdefault(
            (part, decays, distance),
            {
                "name": f"{part}, {'decayed' if decays else 'not decayed'}"
                + (f", {distance} layers from the output" if distance else ""),
                "params": [],
                "lr": scale * rates[part] * optimisation.layer_decay**distance,
                "weight_decay": optimisation.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(groups: list[dict], optimisation: Optimisation) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum 0.9, over parameter groups."""
    if not groups:
        raise ConfigurationError("nothing is trained: neither the method nor the head has trainable parameters")
    if optimisation.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=optimisation.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=optimisation.lr, eps=optimisation.eps)


def build_schedule(optimizer: torch.optim.Optimizer, optimisation: Optimisation, steps: Steps) -> LambdaLR:
    """The schedule, advanced with every optimiser step.

    Args:
        optimizer: its groups have their peak rates.
        optimisation: which schedule.
        steps: optimiser steps of the training, epoch by epoch.
    """
    if optimisation.schedule == "cosine":
        warmup_steps = round(steps.before(optimisation.warmup_epochs))
        return LambdaLR(optimizer, warmup_cosine(warmup_steps, steps.total, optimisation.min_lr_ratio))
    if optimisation.schedule == "cosine_by_epoch":
        return LambdaLR(optimizer, cosine_by_epoch(optimisation, steps))
    by_group = [
        epoch_cosine(group["lr"], optimisation.warmup_lr, optimisation.warmup_epochs, len(steps.by_epoch))
        for group in optimizer.param_groups
    ]
    return LambdaLR(optimizer, [lambda step, factor=factor: factor(steps.epoch_of(step)) for factor in by_group])


def set_peak_rates(schedule: LambdaLR, rates: list[float]) -> None:
    """Let a schedule that a checkpoint has put back go on with peak rates, one for each group, and its own length.

    The optimiser's next rate is that of the training that wrote the checkpoint, which may have been another one or have
    had another end: 0 where a cosine had come to it.
    """
    if not isinstance(schedule, LambdaLR):
        return
    schedule.base_lrs = list(rates)
    for group, rate, factor in zip(schedule.optimizer.param_groups, rates, schedule.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = rate, rate * factor(schedule.last_epoch)


def warmup_cosine(warmup_steps: int, total_steps: int, min_ratio: float = 0.0) -> Callable[[int], float]:
    """The factor on the learning rate at a step.

    (step + 1) / warmup_steps during the warm-up, then from 1 to `min_ratio` along half a cosine that would reach its
    end at `total_steps`.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def cosine_by_epoch(optimisation: Optimisation, steps: Steps) -> Callable[[int], float]:
    """The factor on the learning rate at a step, as mmcv has it, by which AIM is trained (Yang et al., 2023).

    0.5 (1 + cos(pi epoch / epochs)) in each epoch, times r + (1 - r) step / W in the W steps of the warm-up.
    """
    warmup, start = steps.before(optimisation.warmup_epochs), optimisation.warmup_ratio

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * steps.epoch_of(step) / len(steps.by_epoch)))
        return cosine * (start + (1 - start) * step / warmup) if step < warmup else cosine

    return factor


def epoch_cosine(lr: float, warmup_lr: float, warmup_epochs: float, epochs: int) -> Callable[[int], float]:
    """The factor on the learning rate in an epoch, as prompt learners are trained (Zhou et al., 2021).

    `warmup_lr / lr` in the first epochs, then 0.5 (1 + cos(pi (epoch - warmup_epochs) / epochs)), which starts at the
    full rate and, as it is stretched over all epochs, does not come down to 0.
    """

    def factor(epoch: int) -> float:
        if epoch < warmup_epochs:
            return warmup_lr / lr if lr else 0.0
        return 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / max(1, epochs)))

    return factor
