"""Which parameters of a model with adapters are trained, and how far each is from the output."""

from torch import nn

from visionpeft.adapters.access import on_model
from visionpeft.adapters.attach import attached
from visionpeft.adapters.install import check_unchanged, parameters_in_use
from visionpeft.adapters.layer_decay import distances


@on_model
def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the active adapters and of the head in use, for an optimiser. All others have requires_grad=False.

    Raises:
        ConfigurationError: the model's head or a trained parameter was exchanged after the adapter was attached.
    """
    peft = attached(model)
    check_unchanged(model, peft.active)
    return [parameter for parameter in parameters_in_use(peft) if parameter.requires_grad]


@on_model
def layer_distances(model: nn.Module) -> dict[nn.Parameter, int]:
    """How many layers from the output each parameter in use acts: 0 the head, 1 the last block, L the first of L.

    For learning rates that decay from layer to layer: lr * decay ** distance.
    """
    in_use = set(parameters_in_use(attached(model)))
    by_name, parameters = distances(model), dict(model.peft.named_parameters())
    return {p: by_name[f"peft.{name}"] for name, p in parameters.items() if p in in_use}
