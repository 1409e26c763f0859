"""What batches tell about a backbone: gradients of its weights, what its layers read, sizes of its channels."""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter

import torch
import torch.nn as nn
from timm.layers import DropPath, PatchDropout
from torch.nn.modules.dropout import _DropoutNd

from visionpeft.adapters.adapters import attached
from visionpeft.adapters.seen import SeenInputs, SeenOutputs, SeenTokens
from visionpeft.adapters.switch import use
from visionpeft.backbones.whole_model import describe
from visionpeft.errors import ConfigurationError, DataError, UnsupportedError
from visionpeft.methods.parts.measures import Batch, Loss, Place
from visionpeft.methods.parts.sparse_delta import SparseCandidate
from visionpeft.sites import TOKEN_SITES, Placement


class Measures:
    """Passes over the front of the batches, which measure what a method asks for.

    Args:
        model: the model, in evaluation mode, in which the adapter alone acts.
        name: name of the adapter.
        batches: training batches.
        loss: maps the model and a batch to a scalar, a mean over samples.
        head_values: trained values of the adapter's heads.
    """

    def __init__(self, model: nn.Module, name: str, batches: Iterable[Batch], loss: Loss, head_values: int):
        self.model = model
        self.name = name
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
        hardest: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Sums of squared gradients of the loss in weights and biases, by name.

        Args:
            candidates: the weights and biases.
            samples: how many samples are taken from the front of the batches, None for all.
            each: square the gradient of each sample, instead of that of each batch.
            clip: norm to which the gradient of each weight or bias is clipped before it is squared, None for none.
            training: let dropout and stochastic depth act, as in training.
            hardest: of what is taken, how many samples or batches with the largest losses are used, None for all.
        """

        def square(gradient: torch.Tensor) -> torch.Tensor:
            if clip is not None:
                gradient = gradient * (clip / (gradient.norm() + 1e-6)).clamp(max=1.0)
            return gradient.square()

        return self._sums(candidates, samples, each, self.loss, training, square, hardest)

    def gradients(
        self,
        candidates: Mapping[str, SparseCandidate],
        samples: int | None,
        loss: Loss | None = None,
        training: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Sums over batches of the gradients of a loss in weights and biases, by name: their mean, but for a factor.

        Args:
            candidates: the weights and biases.
            samples: how many samples are taken from the front of the batches, None for all.
            loss: another loss than that of the task.
            training: let dropout and stochastic depth act, as in training.
        """
        return self._sums(candidates, samples, False, loss or self.loss, training, lambda gradient: gradient)

    def features(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """What the head of the model reads (batch, width): the pooled features of a model without a head.

        Raises:
            UnsupportedError: the model has several heads, or gives no features.
        """
        heads = describe(model).heads
        if not heads:
            found = model.encode_image(images) if hasattr(model, "encode_image") else model(images)
        elif len(heads) == 1:
            read = []
            hook = model.get_submodule(heads[0]).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
            try:
                model(images)
            finally:
                hook.remove()
            found = read[-1] if read else None
        else:
            raise UnsupportedError(
                f"the features of a model with several heads ({', '.join(heads)}) are not one tensor"
            )
        if not isinstance(found, torch.Tensor) or found.ndim != 2:
            raise UnsupportedError("allocate: this model does not give one vector of features for each image")
        return found

    def inputs(self, places: Sequence[Place], samples: int | None) -> dict[Place, torch.Tensor]:
        """Second moments of what layers read: sums of x x^T (in, in) over the tokens of all positions.

        Args:
            places: linear layers.
            samples: how many samples are taken from the front of the batches, None for all.
        """
        towers = describe(self.model).towers
        reads = {}  # q, k and v read the same
        for place in places:
            site = towers[place.tower].layer(place.block, place.site).reads or place.site
            reads.setdefault((place.tower, place.block, site), []).append(place)
        seen = {group[0]: SeenInputs() for group in reads.values()}
        self._observe(seen, samples)
        return {place: self._finite(seen[group[0]].moments) for group in reads.values() for place in group}

    def sizes(self, places: Sequence[Place], samples: int | None) -> dict[Place, torch.Tensor]:
        """L2 norms (classes, channels) of each channel over the patches of all samples of a class.

        Tokens before the patches are left out. At a token site channels are those of its tokens, at a layer those of
        its output. If the last tensor of a batch is no class for each sample, all of them are of one class.

        Args:
            places: the sites.
            samples: how many samples are taken from the front of the batches, None for all.
        """
        towers = describe(self.model).towers
        seen = {
            place: (SeenTokens() if place.site in TOKEN_SITES else SeenOutputs(towers[place.tower].num_prefix_tokens))
            for place in places
        }
        self._observe(seen, samples)
        return {place: self._finite(module.norms()) for place, module in seen.items()}

    def _sums(
        self,
        candidates: Mapping[str, SparseCandidate],
        samples: int | None,
        each: bool,
        loss: Loss,
        training: bool,
        term: Callable[[torch.Tensor], torch.Tensor],
        hardest: int | None = None,
    ) -> dict[str, torch.Tensor]:
        parameters = list({id(c.parameter): c.parameter for c in candidates.values()}.values())
        sums = {
            name: torch.zeros_like(c.values, dtype=torch.promote_types(c.values.dtype, torch.float32)).detach()
            for name, c in candidates.items()
        }
        with _differentiable(self.model, parameters, training):
            shown = taken(self.batches, samples, each, parameters[0].device)
            for batch in shown if hardest is None else self._hardest(shown, hardest):
                with torch.enable_grad():
                    gradients = torch.autograd.grad(loss(self.model, batch), parameters, allow_unused=True)
                found = {id(p): gradient for p, gradient in zip(parameters, gradients, strict=True)}
                for name, candidate in candidates.items():
                    if (gradient := found[id(candidate.parameter)]) is not None:
                        sums[name] += term(candidate.rows_of(gradient).to(sums[name].dtype))
        if not all(total.isfinite().all() for total in sums.values()):
            raise DataError("allocate: a gradient of the backbone is not finite on these batches")
        if not any(total.any() for total in sums.values()):
            raise ConfigurationError(
                "allocate: all gradients of the backbone are zero, as they are after a head that starts at zero; "
                "start the head with another initialisation (--model.head_init truncated_normal)"
            )
        return sums

    @torch.no_grad()
    def _hardest(self, shown: Iterable[Batch], number: int) -> list[Batch]:
        """The batches with the largest losses; only so many are kept at a time."""
        found = heapq.nlargest(number, ((self.loss(self.model, each).item(), each) for each in shown), itemgetter(0))
        if not all(math.isfinite(loss) for loss, _ in found):
            raise DataError("the loss of a training sample is not finite")
        return [batch for _, batch in found]

    @torch.no_grad()
    def _observe(self, seen: Mapping[Place, nn.Module], samples: int | None) -> None:
        """Run the batches with modules that look at what passes through some places, and leave it as it is."""
        adapter, device = attached(self.model)[self.name], next(self.model.parameters()).device
        placements = adapter.placements
        with use(self.model, None):
            observing = [(0, Placement(place.tower, place.block, place.site, module)) for place, module in seen.items()]
            adapter.placements = [*placements, *observing]
            try:
                with use(self.model, self.name):
                    for batch in taken(self.batches, samples, False, device):
                        labels = batch[-1]
                        is_class = isinstance(labels, torch.Tensor) and labels.ndim == 1
                        for module in seen.values():
                            module.classes = labels if is_class and not labels.is_floating_point() else None
                        self.loss(self.model, batch)
            finally:
                adapter.placements = placements

    def _finite(self, measured: torch.Tensor) -> torch.Tensor:
        if not measured.isfinite().all():
            raise DataError("allocate: what a layer of the backbone reads is not finite on these batches")
        return measured


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


def taken(batches: Iterable[Batch], samples: int | None, each: bool, device: torch.device) -> Iterator[Batch]:
    """The first so many samples of the batches, None for all, each by itself or in the batches they come in.

    Raises:
        DataError: if there are none.
    """
    count = 0
    for batch in batches:
        batch = tuple(_on(device, part[: None if samples is None else samples - count]) for part in batch)
        count += len(batch[0])
        yield from zip(*map(_singly, batch), strict=True) if each else (batch,)
        if count == samples:
            return
    if not count:
        raise DataError("no batch of training data was shown")


def _on(device: torch.device, part: object) -> object:
    """A tensor on the device, or a list and what is in it, of labels such as the objects of each image."""
    if isinstance(part, torch.Tensor):
        return part.to(device)
    if isinstance(part, list):
        return [_on(device, each) for each in part]
    return {name: _on(device, value) for name, value in part.items()} if isinstance(part, dict) else part


def _singly(part: torch.Tensor | list) -> Sequence:
    """Each sample by itself, in a tensor or a list of one."""
    return part.split(1) if isinstance(part, torch.Tensor) else [[each] for each in part]
