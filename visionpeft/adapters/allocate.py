"""Let methods that act where the task needs it see data, which decide what is trained or where it starts."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.adapters.adapters import attached, known
from visionpeft.adapters.attach import exchange
from visionpeft.adapters.attached_adapter import AttachedAdapter, Pending, nest
from visionpeft.adapters.measures import Measures
from visionpeft.adapters.switch import plain, use
from visionpeft.backbones.whole_model import describe
from visionpeft.errors import ConfigurationError
from visionpeft.methods.parts.base import Method, select_towers
from visionpeft.methods.parts.measures import Batch, Loss


def cross_entropy(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean of -log p(label | image) over a batch (images, labels)."""
    images, labels = batch
    return F.cross_entropy(model(images).float(), labels)


def allocate(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss = cross_entropy,
    name: str | None = None,
) -> nn.Module:
    """Show data to a method that finds in them what to train, or where to start.

    `FishMask`, `GPS`, `SecondOrder`, `SPT`, `SCT` and `ChildTuning("D")` choose what of the backbone is changed, `EVA`
    and `LoRAGA` where their factors start.

    Do it after `attach` and before an optimiser is made; `visionpeft.fit` does it by itself. The model is in evaluation
    mode meanwhile, and computes with whatever else the adapter has, its head above all. Nothing is trained, and what
    has been found is saved with the adapter.

    Args:
        model: a model to which such a method is attached.
        batches: training batches, tuples of tensors whose first dimension is that of the samples, such as a DataLoader.
        loss: maps model and batch to a scalar; by default cross-entropy of a batch (images, labels).
        name: which adapter; may be left out if only one waits for data.

    Raises:
        ConfigurationError: if no adapter waits for data, or the gradients are zero because the head is.
        DataError: if there are no batches, or a gradient is not finite.
    """
    peft = attached(model)
    waiting = [each for each in peft if peft[each].pending] if name is None else [known(peft, name)]
    if len(waiting) != 1 or not peft[waiting[0]].pending:
        which = f"{', '.join(waiting)} do; say which with name=" if len(waiting) > 1 else "none does"
        raise ConfigurationError(f"allocate shows data to an adapter that waits for them, but {which}")
    (name,) = waiting
    adapter: AttachedAdapter = peft[name]
    methods, tensors = [], {}
    with _without_pending(model, name), evaluating(model):
        head_values = sum(parameter.numel() for parameter in adapter.head_parameters())
        measured = Measures(model, name, batches, loss, head_values)
        towers = {id(method): select_towers(method, describe(model)) for method in adapter.methods}
        for key, method in zip(adapter.method_keys, adapter.methods, strict=True):
            if method.pending:
                method, found = method.allocate(towers[id(method)], measured)
                tensors |= {f"{key}.{path}": tensor for path, tensor in found.items()}
            methods.append(method)
    remake(model, name, methods, tensors)
    return model


def remake(
    model: nn.Module,
    name: str,
    methods: Sequence[Method],
    tensors: Mapping[str, torch.Tensor],
    kept: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Make an adapter anew with methods that know where they act; heads and what it had already are kept.

    Args:
        model: the model.
        name: name of the adapter.
        methods: as many as it has, none pending.
        tensors: values of some of the new tensors.
        kept: values of the others, as far as they are there; by default those of the adapter as it is.
    """
    old: AttachedAdapter = attached(model)[name]
    with plain(model):
        backbone = describe(model)
        made = AttachedAdapter(tuple(methods), backbone, head=False, train=old.train_names)
    made.head_paths = old.head_paths
    for path in old.head_paths:
        nest(made, path, old.get_submodule(path))
    kept = old.state_dict() if kept is None else kept
    made.load_state_dict({**kept, **tensors}, strict=False)
    exchange(model, name, made, backbone)


@contextmanager
def _without_pending(model: nn.Module, name: str):
    """Within the context, one adapter acts alone, and its methods that wait for data do nothing."""
    adapter = attached(model)[name]
    placements = adapter.placements
    with use(model, None):
        adapter.placements = [p for p in placements if not isinstance(p[1].module, Pending)]
        try:
            with use(model, name):
                yield
        finally:
            adapter.placements = placements


@contextmanager
def evaluating(model: nn.Module):
    """Within the context the model is in evaluation mode; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
