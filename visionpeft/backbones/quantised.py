"""Weights that torchao has quantised: they act as linear layers, but have no arithmetic of their own."""

from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.errors import UnsupportedError, one_line

TOLERANCE = 2**-5  # relative: eight times what bfloat16 rounds away from one product


def is_quantised(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds integers and scales instead of the numbers that it stands for."""
    # Plain tensors first: `torch.compile` can trace no more than this.
    return type(tensor) not in (torch.Tensor, nn.Parameter) and type(tensor).__module__.startswith("torchao.")


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers that a tensor stands for; of a plain tensor, the tensor itself."""
    return tensor.dequantize() if is_quantised(tensor) else tensor


def has_rows(weight: torch.Tensor) -> bool:
    """Whether single rows of a weight can be read: some quantised ones (NF4) have them packed over their borders."""
    if not is_quantised(weight):
        return True
    try:
        full_precision(weight.detach()[:1])
    except (NotImplementedError, TypeError, RuntimeError):  # what torchao's kinds raise where slicing is not there
        return False
    return True


def dequantise(module: nn.Module) -> nn.Module:
    """Put the numbers in the place of every quantised weight of a module."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and is_quantised(parameter):
                part._parameters[name] = nn.Parameter(full_precision(parameter.detach()), requires_grad=False)
    return module


def computing_dtype(model: nn.Module, owner: nn.Module, name: str = "weight") -> torch.dtype:
    """The precision in which a layer computes: that of its parameter `name`, unless that is quantised.

    A quantised weight goes on naming the precision that it was made from, whatever the model was moved to since. Then
    it is that of the layer's bias, or else of the first parameter of the model's own that holds numbers.
    """
    # findings/torchao_weights_do_not_follow_to_another_precision.sh
    parameter = getattr(owner, name)
    if not is_quantised(parameter):
        return parameter.dtype
    own = (value for path, value in model.named_parameters() if not path.startswith("peft."))
    return next(
        (value.dtype for value in (*owner.parameters(recurse=False), *own) if _holds_numbers(value)), parameter.dtype
    )


def _holds_numbers(tensor: torch.Tensor) -> bool:
    return not is_quantised(tensor) and tensor.is_floating_point()


def check_products(model: nn.Module) -> None:
    """Refuse quantised layers with which adapters would not learn, or merged weights would not compute the same.

    For every kind of quantised weight W of a linear layer one product with a small random x is compared with that of
    the numbers it stands for: x W^T, and its gradient in x.

    Raises:
        UnsupportedError: naming the layer, and what is wrong with its product.
    """
    seen = set()
    for path, weight, dtype in _quantised_layers(model):
        names, context = weight.__tensor_flatten__()
        kind = type(weight), tuple(names), str(context), dtype
        if kind not in seen and not weight.is_meta:
            seen.add(kind)
            check_product(path, weight, dtype)


def _quantised_layers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, torch.dtype]]:
    for part, child in model.named_children():
        for path, module in child.named_modules(prefix=part) if part != "peft" else ():
            if isinstance(module, nn.Linear) and is_quantised(module.weight):
                yield path, module.weight, computing_dtype(model, module)


def check_product(path: str, weight: torch.Tensor, dtype: torch.dtype) -> None:
    """Refuse a quantised weight whose products are not those of its numbers, or have no gradient.

    Raises:
        UnsupportedError: naming the layer, and what is wrong with its product.
    """
    kind = f"{path}: the {type(weight).__name__} of torchao"
    # Of a generator of its own, so that what the user draws next does not depend on whether it was checked.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[1], generator=generator).to(weight.device, dtype).requires_grad_()
    try:
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            y = F.linear(x, weight)
    # torchao's kinds raise each of these where they have no such product.
    except (RuntimeError, NotImplementedError, AssertionError, TypeError) as error:
        raise UnsupportedError(
            f"{kind} cannot be multiplied with {str(dtype).removeprefix('torch.')} ({one_line(error)}); bring the "
            "model into its precision first, then quantise it"
        ) from error
    if not y.requires_grad:  # findings/torchao_cuts_gradients_of_quantised_activations.sh
        raise UnsupportedError(
            f"{kind} quantises what it is multiplied with, too, and gives it no gradient, so that no adapter before it "
            "would learn; quantise weights only, such as with Int8WeightOnlyConfig"
        )
    numbers = full_precision(weight.detach()).double()
    upstream = torch.randn(y.shape, generator=generator).to(y)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    for what, value, expected in (
        ("product", y.detach(), x.detach().double() @ numbers.t()),
        ("gradient", gradient, upstream.double() @ numbers),
    ):
        error = (value.double() - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny)
        if not error <= TOLERANCE:
            raise UnsupportedError(
                f"{kind} gives another {what} than the numbers it stands for (relative difference {float(error):.1e}); "
                "quantise weights only, such as with Int8WeightOnlyConfig"
            )
