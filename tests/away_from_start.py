"""Models and adapters whose every tensor is away from where it starts, so that none hides what another one does."""

import torch


@torch.no_grad()
def shaken(model):
    """The model, with noise of the present seed on every parameter."""
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def moved(model):
    """Every tensor of the adapter moved from where it starts; those of its modules by path."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.peft.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return {name.split(".visual.")[-1]: value.detach() for name, value in model.peft.named_parameters()}
