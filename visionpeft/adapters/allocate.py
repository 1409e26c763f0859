"""Let methods that act where the task needs it see data: squared gradients of the backbone decide what is trained."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, PatchDropout
from torch.nn.modules.dropout import _DropoutNd

from visionpeft.adapters.adapters import AttachedAdapter, Pending, nest
from visionpeft.adapters.attach import attached, exchange, known, plain, use
from visionpeft.backbones.dispatch import describe
from visionpeft.errors import ConfigurationError, DataError
from visionpeft.methods.parts.base import Method, select_towers
from visionpeft.methods.parts.sparse_delta import SparseCandidate

Batch = Sequence[torch.Tensor]


def cross_entropy(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean of -log p(label | image) over a batch (images, labels)."""
    images, labels = batch
    return F.cross_entropy(model(images).float(), labels)


def allocate(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], torch.Tensor] = cross_entropy,
    name: str | None = None,
) -> nn.Module:
    """Show data to `FishMask`, `SPT` or `ChildTuning("D")`, which find in them what of the backbone to train.

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
        measured = SquaredGradients(model, batches, loss, head_values)
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
    made.heads = old.heads
    for path in old.heads:
        nest(made, path, old.get_submodule(path))
    kept = old.state_dict() if kept is None else kept
    made.load_state_dict({**kept, **tensors}, strict=False)
    exchange(model, name, made, backbone)


class SquaredGradients:
    """Sums of squared gradients of the loss in weights and biases of the backbone.

    Args:
        model: the model, in evaluation mode.
        batches: training batches.
        loss: maps model and batch to a scalar, a mean over samples.
        head_values: trained values of the adapter's heads.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        loss: Callable[[nn.Module, Batch], torch.Tensor],
        head_values: int,
    ):
        self.model = model
        self.batches = batches
        self.loss = loss
        self.head_values = head_values

    def __call__(
        self,
        candidates: Mapping[str, SparseCandidate],
        samples: int,
        each: bool,
        clip: float | None = None,
        training: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Measure.

        Args:
            candidates: the weights and biases.
            samples: how many samples are taken from the front of the batches.
            each: square the gradient of each sample, instead of that of each batch.
            clip: norm to which the gradient of each weight or bias is clipped before it is squared, None for none.
            training: let dropout and stochastic depth act, as in training.
        """
        parameters = list({id(c.parameter): c.parameter for c in candidates.values()}.values())
        scores = {
            name: torch.zeros_like(c.values, dtype=torch.promote_types(c.values.dtype, torch.float32)).detach()
            for name, c in candidates.items()
        }
        with _differentiable(self.model, parameters, training):
            for batch in taken(self.batches, samples, each, parameters[0].device):
                with torch.enable_grad():
                    gradients = torch.autograd.grad(self.loss(self.model, batch), parameters, allow_unused=True)
                found = {id(p): gradient for p, gradient in zip(parameters, gradients, strict=True)}
                for name, candidate in candidates.items():
                    if (gradient := found[id(candidate.parameter)]) is not None:
                        gradient = candidate.rows_of(gradient).to(scores[name].dtype)
                        if clip is not None:
                            gradient = gradient * (clip / (gradient.norm() + 1e-6)).clamp(max=1.0)
                        scores[name] += gradient.square()
        if not all(score.isfinite().all() for score in scores.values()):
            raise DataError("allocate: a gradient of the backbone is not finite on these batches")
        if not any(score.any() for score in scores.values()):
            raise ConfigurationError(
                "allocate: all gradients of the backbone are zero, as they are after a head that starts at zero; "
                "start the head with another initialisation (--model.head_init truncated_normal)"
            )
        return scores


@contextmanager
def _differentiable(model: nn.Module, parameters: Iterable[nn.Parameter], training: bool):
    """Within the context, parameters have gradients, and in `training` what is drawn acts."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    drawn = [m for m in model.modules() if training and isinstance(m, DropPath | PatchDropout | _DropoutNd)]
    try:
        for module in drawn:
            module.train()
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for module in drawn:
            module.eval()
        for parameter in frozen:
            parameter.requires_grad_(False)


def taken(batches: Iterable[Batch], samples: int, each: bool, device: torch.device) -> Iterator[Batch]:
    """The first so many samples of the batches, each by itself or in the batches they come in.

    Raises:
        DataError: if there are none.
    """
    left = samples
    for batch in batches:
        batch = tuple(tensor[:left].to(device) for tensor in batch)
        left -= len(batch[0])
        yield from zip(*(tensor.split(1) for tensor in batch), strict=True) if each else (batch,)
        if left <= 0:
            return
    if left == samples:
        raise DataError("no batch of training data was shown")


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
