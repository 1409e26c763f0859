"""Which parameters of a model with adapters are trained, and how far each is from the output."""

from torch import nn

from visionpeft.adapters.access import on_model
from visionpeft.adapters.adapters import attached
from visionpeft.adapters.layer_decay import distances
from visionpeft.adapters.resting import parameters_in_use
from visionpeft.adapters.training_hooks import acting
from visionpeft.adapters.unchanged import check_unchanged


@on_model
def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the active adapters and of the head in use, for an optimiser. All others have requires_grad=False.

    Without those that a method learns on a held-out part of the data, for which there is `visionpeft.Selection`.

    Raises:
        ConfigurationError: the model's head or a trained parameter was exchanged after the adapter was attached.
    """
    peft = attached(model)
    check_unchanged(model, peft.active)
    selected = {id(parameter) for parameter in selection_parameters(model)}
    return [p for p in parameters_in_use(peft) if p.requires_grad and id(p) not in selected]


@on_model
def selection_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that the methods of the active adapters learn on a held-out part of the training data."""
    return [parameter for method, part in acting(model) for parameter in method.selects(part)]


@on_model
def layer_distances(model: nn.Module) -> dict[nn.Parameter, int]:
    """How many layers from the output each parameter in use acts: 0 the head, 1 the last block, L the first of L.

    For learning rates that decay from layer to layer: lr * decay ** distance.
    """
    in_use = set(parameters_in_use(attached(model)))
    by_name, parameters = distances(model), dict(model.peft.named_parameters())
    return {p: by_name[f"peft.{name}"] for name, p in parameters.items() if p in in_use}
