"""What tests look at in a model: its output, its bytes, and everything else that detaching has to put back."""

import torch


def anatomy(model):
    """Everything about a module tree that detaching has to put back, except the values."""
    found = {}
    for name, module in model.named_modules():
        hooks = [len(value) for key, value in vars(module).items() if key.endswith("hooks")]
        names = {k: tuple(vars(module)[k]) for k in ("_parameters", "_buffers", "_modules")}
        found[name] = type(module), sorted(vars(module)), names, hooks, module.training
    return found, {n: p.requires_grad for n, p in model.named_parameters()}


def output_of(host, model, batch=2, dtype=torch.float32):
    """The model's output without gradients."""
    with torch.no_grad():
        return host.run(model, host.inputs(batch, dtype))


def loss_of(host, model, dtype=torch.float32):
    """A scalar that depends on all of the output."""
    output = host.run(model, host.inputs(dtype=dtype))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (output * weights.to(output.dtype)).sum()


def base_state(model):
    """Copies of the state of the model without what attaching adds."""
    return {k: v.detach().clone() for k, v in model.state_dict().items() if not k.startswith("peft.")}


def same_bytes(left, right):
    """Whether two state dicts are equal in keys, types and bytes."""
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def distance(left, right):
    """Relative distance of two tensors, by norm."""
    return ((left - right).norm() / right.norm()).item()
