"""What methods learn on a held-out part of the training data, by an optimiser of its own, while the rest is trained.

Of the trained w and the selection variables a (`Method.selects`), a step of a goes down the gradient of the held-out
loss after one step of w, as in DARTS (Liu, Simonyan, Yang, 2019, https://arxiv.org/abs/1806.09055):

    d/da L_held(w - rate g(w, a), a),   g = d/dw L_train(w, a)
    = d/da L_held(w', a) - rate (d/da d/dw L_train(w, a)) v,   w' = w - rate g,  v = d/dw L_held(w', a).

The product with v is the finite difference of DARTS, (d/da L_train(w + e v, a) - d/da L_train(w - e v, a)) / (2 e) with
e = 0.01 / |v|: fused attention has no second derivative. It costs four passes forwards and backwards. w' is a step of
plain gradient descent, whatever optimiser trains w. No other part of the library knows of the held-out part.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from visionpeft.adapters.access import alone_with, uncompiled
from visionpeft.adapters.adapters import attached
from visionpeft.adapters.allocate import cross_entropy
from visionpeft.adapters.trained import selection_parameters, trainable_parameters
from visionpeft.errors import ConfigurationError
from visionpeft.methods.parts.measures import Batch, Loss

DISTANCE = 0.01  # |e v|
BETAS = (0.5, 0.999)


class Selection:
    """The second optimiser: Adam with betas 0.5 and 0.999, over what the methods of a model select.

        selection = visionpeft.Selection(model)
        for batch, held_out in zip(batches, held_out_batches):
            selection.step(batch, held_out, rate=1e-3)  # then a step of the other optimiser on `batch`

    `visionpeft.fit` does it by itself.

    Args:
        model: a model to which a method is attached that learns on a held-out part, such as `AutoLoRA`.
        lr: learning rate; by default the method's.
        loss: maps model and batch to a scalar; by default cross-entropy of a batch (images, labels).

    Raises:
        ConfigurationError: no method does.
    """

    def __init__(self, model: nn.Module, lr: float | None = None, loss: Loss = cross_entropy):
        self.model = uncompiled(model)
        self.loss = loss
        self.parameters = selection_parameters(model)
        if not self.parameters:
            raise ConfigurationError("Selection: no method of the active adapters learns on a held-out part")
        if lr is None:
            peft = attached(self.model)
            methods = [method for name in peft.active for method in peft[name].methods if method.held_out]
            lr = methods[0].selection_lr
        self.optimiser = torch.optim.Adam(self.parameters, lr=lr, betas=BETAS)

    def step(self, batch: Batch, held_out: Batch, rate: float) -> None:
        """One step of the selection variables; all else, buffers as well, is what it was, bit by bit.

        What is drawn, such as dropout, is the same in all passes of the training batch.

        Args:
            batch: the training batch of the next step.
            held_out: a batch of the held-out part.
            rate: the learning rate of the step of w that is looked ahead.
        """
        trained = trainable_parameters(self.model)
        kept = [(tensor, tensor.detach().clone()) for tensor in self.model.peft.buffers()]
        seed = int(torch.randint(2**62, (1,)))

        def drawn_alike(data: Batch) -> torch.Tensor:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                return self.loss(self.model, data)

        with alone_with(self.model), torch.enable_grad():
            gradients = unrolled_gradient(
                lambda: drawn_alike(batch), lambda: drawn_alike(held_out), trained, self.parameters, rate
            )
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimiser.step()
        self.optimiser.zero_grad()


def unrolled_gradient(
    train_loss: Callable[[], torch.Tensor],
    held_out_loss: Callable[[], torch.Tensor],
    trained: Sequence[torch.Tensor],
    selected: Sequence[torch.Tensor],
    rate: float,
) -> list[torch.Tensor]:
    """Gradient of the held-out loss after one step of gradient descent, in the selection variables.

    Args:
        train_loss: the training loss at the present values.
        held_out_loss: the held-out loss at the present values.
        trained: w, leaves, which are moved on the way and moved back.
        selected: a, leaves.
        rate: of the step.
    """
    start = [tensor.detach().clone() for tensor in trained]

    def at(directions: Sequence[torch.Tensor | None], size: float) -> None:
        with torch.no_grad():
            for tensor, value, direction in zip(trained, start, directions, strict=True):
                tensor.copy_(value if direction is None else value + size * direction)

    def slope(loss: Callable[[], torch.Tensor], of: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        return list(torch.autograd.grad(loss(), of, allow_unused=True))

    try:
        at(slope(train_loss, trained), -rate)
        ahead = slope(held_out_loss, [*trained, *selected])
        direction, direct = ahead[: len(trained)], ahead[len(trained) :]
        length = torch.stack([each.double().norm() for each in direction if each is not None] or [torch.zeros(())])
        length = length.norm().item()
        if not rate or not length:
            return _sums(selected, direct, direct, direct, 0.0)
        distance = DISTANCE / length
        at(direction, distance)
        above = slope(train_loss, selected)
        at(direction, -distance)
        below = slope(train_loss, selected)
        return _sums(selected, direct, above, below, rate / (2 * distance))
    finally:
        at([None] * len(start), 0.0)


def _sums(
    selected: Sequence[torch.Tensor],
    direct: Sequence[torch.Tensor | None],
    above: Sequence[torch.Tensor | None],
    below: Sequence[torch.Tensor | None],
    factor: float,
) -> list[torch.Tensor]:
    """direct - factor (above - below), None being zero."""
    rows = [
        [torch.zeros_like(like) if each is None else each for each in row]
        for like, *row in zip(selected, direct, above, below, strict=True)
    ]
    return [first - factor * (second - third) for first, second, third in rows]
