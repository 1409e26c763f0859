"""Methods that are trained more than once: train, choose by what was trained, go back to the start, train again."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn as nn

from visionpeft.adapters.access import on_model
from visionpeft.adapters.adapters import attached, chosen_name, known
from visionpeft.adapters.allocate import cross_entropy, evaluating, remake
from visionpeft.adapters.attached_adapter import AttachedAdapter
from visionpeft.adapters.measures import Measures, taken
from visionpeft.adapters.switch import plain, use
from visionpeft.backbones.whole_model import describe
from visionpeft.errors import ConfigurationError
from visionpeft.methods.parts.base import Method, require, select_towers
from visionpeft.methods.parts.measures import Batch


def stages(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    loss: Callable[[nn.Module, Batch], torch.Tensor] = cross_entropy,
    name: str | None = None,
) -> Iterator[int]:
    """The numbers of the trainings that a method wants, from 1 on; between two of them it chooses what is trained next.

        for stage in visionpeft.stages(model, batches):
            optimiser = torch.optim.AdamW(visionpeft.trainable_parameters(model))  # of this stage
            ...  # train

    After each stage but the last, the adapter is made anew as the method says, and goes back to what it was before the
    first, its head as well, unless the method goes on from where it is. Copies of the backbone's parameters go back to
    what they are in the backbone. A method that is trained once has one stage. `visionpeft.fit` does all of this by
    itself.

    Args:
        model: a model to which a method is attached, before its training.
        batches: training batches, tuples of tensors whose first dimension is that of the samples, for methods that
            choose by gradients.
        loss: maps model and batch to a scalar; by default cross-entropy of a batch (images, labels).
        name: which adapter; may be left out if there is only one.

    Raises:
        ConfigurationError: several methods are trained in stages, or one waits for data as well; batches are missing;
            or a training has left nothing to choose by.
    """
    peft = attached(model)
    name = chosen_name(peft, name, "is trained")
    method = staged(peft[name])
    if method is not None and method.pending:
        raise ConfigurationError(
            f"{type(method).__name__} waits for data before its first stage; call visionpeft.allocate(model, batches)"
        )
    start, number = start_of(peft[name]), 1
    yield number
    while staged(attached(model)[known(attached(model), name)]) is not None:
        begin_next(model, name, start, batches, loss)
        number += 1
        yield number


def staged(adapter: AttachedAdapter) -> Method | None:
    """The method of an adapter that is to be trained again after the present training, None if there is none.

    Raises:
        ConfigurationError: there are several, or another method of the adapter waits for data.
    """
    found = [method for method in adapter.methods if method.stages_after]
    if not found:
        return None
    names = " and ".join(type(method).__name__ for method in found)
    if len(found) > 1:
        raise ConfigurationError(f"{names} are both trained in stages; attach one of them")
    waiting = [type(method).__name__ for method in adapter.methods if method.pending and method is not found[0]]
    if waiting:
        raise ConfigurationError(
            f"{names} is trained in stages and {waiting[0]} waits for data, which it would see in one of them only; "
            "attach one of the two"
        )
    return found[0]


def check_last_stage(adapter: AttachedAdapter) -> None:
    """Refuse an adapter whose method is to be trained again.

    Raises:
        ConfigurationError: naming the method.
    """
    for method in adapter.methods:
        more = method.stages_after
        require(
            more == 0,
            method,
            f"it is trained in stages, {more} more of them to come; train in the loop of visionpeft.stages, or with "
            "visionpeft.fit",
        )


def start_of(adapter: AttachedAdapter) -> dict[str, torch.Tensor]:
    """What the stages of an adapter start from: its tensors, but for what the backbone itself has."""
    return {key: value.clone() for key, value in adapter.state_dict().items() if not key.startswith("trained.")}


@on_model
def begin_next(
    model: nn.Module,
    name: str,
    start: Mapping[str, torch.Tensor],
    batches: Iterable[Batch] | None,
    loss: Callable[[nn.Module, Batch], torch.Tensor],
) -> None:
    """Let the method of an adapter choose what the next stage trains, and put the adapter at its beginning.

    Args:
        model: the model.
        name: name of the adapter, whose training has ended.
        start: its `start_of` before the first stage.
        batches: training batches, None if there are none.
        loss: maps model and batch to a scalar.

    Raises:
        ConfigurationError: the method has nothing to choose by.
    """
    adapter: AttachedAdapter = attached(model)[name]
    method = staged(adapter)
    (index,) = [index for index, each in enumerate(adapter.methods) if each is method]
    key = adapter.method_keys[index]

    with plain(model), torch.no_grad():
        towers = select_towers(method, describe(model))
        part = adapter._modules.get(key, nn.ModuleDict())
        own = {path.removeprefix(f"{key}."): value for path, value in start.items() if path.startswith(f"{key}.")}
        shown = ShownSamples(model, name, method, batches, loss)
        following, tensors = method.next_stage(towers, part, own, dict(adapter.trained_parameters()), shown)
    methods = [following if each is method else each for each in adapter.methods]
    named = {f"{key}.{path}": tensor for path, tensor in tensors.items()}
    remake(model, name, methods, named, start if method.rewinds else None)


class ShownSamples:
    """What a method can measure after a stage: the `Measure` of `next_stage`, with the adapter as it was trained.

    Args:
        model: the model.
        name: name of the adapter.
        method: which method measures.
        batches: training batches, None if there are none.
        loss: maps model and batch to a scalar.
    """

    def __init__(self, model: nn.Module, name: str, method: Method, batches: Iterable[Batch] | None, loss: Callable):
        self.model, self.name, self.method, self.batches, self.loss = model, name, method, batches, loss

    def __call__(self, parameters: Sequence[nn.Parameter], samples: int, see: Callable) -> int:
        """Show it the gradients in these parameters of the loss of each of so many samples."""
        with self._acting():
            count = 0
            for batch in taken(self.batches, samples, True, parameters[0].device):
                see(torch.autograd.grad(self.loss(self.model, batch), parameters))
                count += 1
        return count

    @property
    def squares(self) -> Callable[..., dict[str, torch.Tensor]]:
        """Measures squared gradients of the backbone's weights."""
        adapter: AttachedAdapter = attached(self.model)[self.name]
        head_values = sum(parameter.numel() for parameter in adapter.head_parameters())
        return _Squares(self, Measures(self.model, self.name, self.batches, self.loss, head_values))

    @contextmanager
    def _acting(self) -> Iterator[None]:
        require(self.batches is not None, self.method, "it chooses by gradients: give stages batches of training data")
        with use(self.model, self.name), evaluating(self.model), torch.enable_grad():
            yield


class _Squares:
    """`Measures` with the adapter acting."""

    def __init__(self, shown: ShownSamples, measures: Measures):
        self.shown, self.measures, self.head_values = shown, measures, measures.head_values

    def __call__(self, *arguments, **options) -> dict[str, torch.Tensor]:
        with self.shown._acting():
            return self.measures(*arguments, **options)
