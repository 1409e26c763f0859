"""Frozen layers with less kept for the backward pass than their formulas say, less work, and the same results.

* `linear`: a frozen linear layer and the low-rank or sparse changes W + s B A, W + D of its rows in one step. Its input
  is not kept where it can be made again: the output of a norm from the tokens it normalises, that of an activation from
  its input, both of which are kept anyway. Under autocast the frozen weight is cast once more in the backward pass,
  where PyTorch by itself keeps the cast copy of every frozen weight.
* `remember`: marks a tensor with what it is made from.
* `scale_shift`: s y + t, whose gradient for s is taken from the result, which attention and activation keep anyway.
* `own`: a part of a tensor that does not keep the whole.

Where a graph is traced (`torch.compile`, `torch.export`), the compiler decides what is kept, and the formulas run as
they are. The gradients can be differentiated again (`create_graph=True`): whatever the backward pass reads is an input
or output of its function, or is made again from those, so that it knows where it comes from.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

# what acts on which rows of the output of a layer; None for all rows
Acting = Sequence[tuple[slice | None, tuple[Callable, ...]]]

SMALLEST_SCALE = 1 / 16  # relative to max(1, |shift|): dividing by less would cost more than one digit


def traced() -> bool:
    """Whether a graph is being made of what runs (compiled, exported, traced by jit or fx), or `torch.func` transforms
    it.
    """
    transformed = torch._C._are_functorch_transforms_active()
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or is_fx_symbolic_tracing() or transformed


def is_plain(layer: Callable) -> bool:
    """Whether calling a layer is `F.linear` with its weight and bias and nothing else."""
    # A forward of a subclass or of the instance computes something else, and a hook must see a real call.
    forward = getattr(type(layer), "idle_forward", type(layer).forward) if isinstance(layer, nn.Linear) else None
    own = forward is nn.Linear.forward and "forward" not in vars(layer) and not _acts(layer)
    return own and not is_hooked(layer) and (traced() or not nn.modules.module._has_any_global_hook())


def _acts(layer: nn.Module) -> bool:
    """Whether anything acts on the input or output of a layer, if it is sited."""
    return bool(getattr(layer, "acting", ()) or getattr(layer, "entering", ()))


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook watches the calls of a module."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    return bool(before or after or module._backward_pre_hooks or module._backward_hooks)


@dataclass(frozen=True)
class Origin:
    """What a tensor is made from: function(*tensors), under autocast to a dtype or without.

    Args:
        function: pure, and cheap to run again.
        tensors: its arguments.
        autocast: the dtype.
        version: that of the tensor when it was made; what was changed in place since is something else.
    """

    function: Callable
    tensors: tuple[torch.Tensor | None, ...]
    autocast: torch.dtype | None
    version: int

    def remake(self, *tensors: torch.Tensor | None) -> torch.Tensor:
        """The tensor again, from its arguments."""
        with torch.autocast(tensors[0].device.type, self.autocast, enabled=self.autocast is not None):
            return self.function(*tensors)

    def recipe(self) -> "Origin":
        """The same without the tensors, which are then kept only where the backward pass frees them."""
        return replace(self, tensors=())


def remember(y: torch.Tensor, function: Callable, *tensors: torch.Tensor | None) -> torch.Tensor:
    """Mark y = function(*tensors); the first of the tensors is kept for the backward pass anyway."""
    # What shares memory with its source (an identity, a view) would not be freed by forgetting it. Sources are
    # detached: what is made again is a value for the weight gradients, and must not hold the graph of the forward pass.
    if torch.is_grad_enabled() and not shares_memory(y, tensors[0]):
        # Not detached: a gradient that is differentiated again follows the remade tensor back through its sources.
        y.origin = Origin(function, tensors, autocast_dtype(y), y._version)
    return y


def shares_memory(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors are parts of the same memory."""
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def origin_of(x: torch.Tensor) -> Origin | None:
    """What a tensor is made from, if `remember` was told and it is still the same."""
    origin = getattr(x, "origin", None)
    return origin if origin is not None and origin.version == x._version else None


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype in which autocast multiplies, None without autocast. It leaves float64 alone."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else None


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, acting: Acting
) -> tuple[torch.Tensor, Acting]:
    """y = x W^T + b (..., out) with those changes of W and b that act first on its rows, and what is left to act.

    A module says what it is: by `low_rank_change() -> (A, B, s)` that s B A x added to the rows is all it does; by
    `sparse_change() -> (values, index, d)` that the rows are those of W + D and b + d, where D has these values at
    these flat indices of its rows and is zero elsewhere; by None that it is neither. Or by `low_rank_by_row(x) -> (A,
    B)`, with A (samples, rank, in) and B (samples, out, rank), that B A x is added, with an A and B of each sample; by
    None that it is not so. That is for passes without gradients.
    """
    # Other tensor classes (quantised, sharded, wrapped) bring products of their own, which only F.linear calls.
    frozen = type(weight) in (torch.Tensor, nn.Parameter) and not (weight.requires_grad and torch.is_grad_enabled())
    if traced() or not frozen:
        return F.linear(x, weight, bias), acting
    changes, left = _Changes(), []
    for rows, modules in acting:
        rows = slice(0, len(weight)) if rows is None else rows
        # Modules act in their order, so what follows the first one that cannot be taken over is left to act, too.
        first = next((i for i, module in enumerate(modules) if not changes.add(module, rows, x, weight, bias)), None)
        left.append((rows, () if first is None else modules[first:]))
    # Without a change of the weight there is nothing to save: PyTorch keeps no input for a frozen weight either. Under
    # autocast, though, it would keep the cast copy of the weight.
    if not changes.factors and not changes.entries and autocast_dtype(x) is None:
        return changes.by_row(x, F.linear(x, weight, changes.of_bias(bias))), left
    y = _FrozenLinear.apply(x, weight, changes.of_bias(bias), origin_of(x), *changes.arguments())
    return changes.by_row(x, y), left


class _Changes:
    """The changes of one weight and bias that are made in one step with the layer."""

    def __init__(self):
        self.factors: list[tuple[slice, torch.Tensor, torch.Tensor, float]] = []  # rows, A, B, s
        self.entries: list[tuple[slice, torch.Tensor, torch.Tensor]] = []  # rows, values, index
        self.biases: list[tuple[slice, torch.Tensor]] = []
        self.factors_by_row: list[tuple[slice, torch.Tensor, torch.Tensor]] = []  # rows, A and B of each sample

    def add(
        self, module: Callable, rows: slice, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> bool:
        """Take over what a module does to some rows, if that is possible."""
        if hasattr(module, "low_rank_by_row"):
            found = module.low_rank_by_row(x) if x.dtype == weight.dtype else None
            if found is not None:
                self.factors_by_row.append((rows, *found))
            return found is not None
        low_rank = _said(module, "low_rank_change")
        if low_rank is not None:
            self.factors.append((rows, *low_rank))
            return True
        sparse = _said(module, "sparse_change")
        if sparse is None:
            return False
        values, index, of_bias = sparse
        # Added to a weight of another precision, small values would be rounded away.
        if values is not None and values.dtype != weight.dtype:
            return False
        if of_bias is not None and (bias is None or of_bias.dtype != bias.dtype):
            return False
        if values is not None:
            self.entries.append((rows, values, index))
        if of_bias is not None:
            self.biases.append((rows, of_bias))
        return True

    def of_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The bias with its changes."""
        # Out of place and through autograd, which gives each change its gradient as the sum over the tokens.
        for rows, change in self.biases:
            bias = bias.slice_scatter(bias[rows] + change, 0, rows.start, rows.stop)
        return bias

    def by_row(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y (..., out) with the low-rank changes of each sample of x (..., in) added to it in place."""
        if self.factors_by_row:
            rows, down, up = zip(*self.factors_by_row, strict=True)
            samples = len(down[0])
            # z = x A^T of every sample, for all changes in one narrow product; then z B^T, added where it belongs.
            z = torch.bmm(x.reshape(samples, -1, x.shape[-1]), torch.cat(down, dim=1).mT)
            flat = y.view(samples, -1, y.shape[-1])
            parts = z.split([each.shape[1] for each in down], dim=2)
            for own_rows, part, own_up in zip(rows, parts, up, strict=True):
                flat[:, :, own_rows].baddbmm_(part, own_up.mT)
        return y

    def arguments(self) -> tuple:
        """What `_FrozenLinear` is given of them."""
        rows, down, up, scalings = zip(*self.factors, strict=True) if self.factors else ((), (), (), ())
        places = tuple((rows, index) for rows, _, index in self.entries)
        return rows, scalings, places, *down, *up, *(values for _, values, _ in self.entries)


def sparse_product(
    x: torch.Tensor, values: torch.Tensor, index: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """x D^T (..., out) in a dtype, for D (out, in) with these values at these flat indices and zeros elsewhere.

    Neither D nor its gradient is kept, and x only where it cannot be made again.
    """
    nothing = values.new_zeros(()).expand(shape)  # W = 0 of full shape, in the memory of one number
    places = ((slice(0, shape[0]), index),)
    if traced():
        return F.linear(x.to(dtype), _with_entries(nothing, places, [values]).to(dtype))
    return _FrozenLinear.apply(x.to(dtype), nothing, None, origin_of(x), (), (), places, values)


def _said(module: Callable, name: str):
    """What a module says of itself; the method of a subclass with a forward of its own must be its own, too."""
    defining = next((kind.__dict__ for kind in type(module).__mro__ if "forward" in kind.__dict__), {})
    return getattr(module, name)() if name in defining and not is_hooked(module) else None


class _FrozenLinear(torch.autograd.Function):
    """y = x (W + D)^T + b, where s x A^T B^T is added to the rows of each low-rank change.

    Changes are all A, then all B, then the values of all D.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, origin, rows, scalings, places, *changes):
        autocast = autocast_dtype(x)

        def cast(tensor):
            return tensor if autocast is None or tensor is None else tensor.to(autocast)

        # y0 = x (W + D)^T + b, for all rows at once.
        down, up, values = _sorted(changes, len(rows))
        y = F.linear(cast(x), cast(_with_entries(weight, places, values)), cast(bias))
        # Of more than two dimensions it is a view of a matrix, and autograd lets nobody overwrite a view that comes out
        # of a function of ours: NaFlexVit adds its positions in place.
        y = torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y
        kept = ()
        if rows:
            dtype = autocast or down[0].dtype  # an adapter computes in its own precision, unless autocast chooses
            # z^T = [A_1; A_2; ...] x^T in one narrow product; then s_i z_i B_i^T is added to its rows of y in place.
            # mul_ leaves s_i z_i in z, which is what the gradient of B_i needs. A x^T and not x A^T: on a CPU a product
            # with few rows takes half to a quarter of the time of one with few columns.
            z = torch.cat(down).to(dtype) @ x.to(dtype).flatten(0, -2).t()
            flat = y.view(-1, y.shape[-1])
            for own_rows, part, scaling, b in zip(rows, _parts(z, down), scalings, up, strict=True):
                _add_product(flat[:, own_rows], part.mul_(scaling).t(), b.to(dtype).t())
            kept = (z,)
        # x itself is needed for the gradients of A and D alone: dA = (s g B)^T x, dD = g^T x at the entries. Of x with
        # a known origin its sources are kept, which are kept for the backward pass of what made it anyway.
        if any(ctx.needs_input_grad[7:]):
            kept += (x,) if origin is None else origin.tensors
        ctx.save_for_backward(weight, *changes, *kept)
        ctx.origin, ctx.rows, ctx.scalings, ctx.places = origin and origin.recipe(), rows, scalings, places
        ctx.dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, grad):
        # Saved were the weight, all A, all B, all values, then z if there are low-rank changes, then x or its sources.
        number = 2 * len(ctx.rows) + len(ctx.places)
        weight, *tensors = ctx.saved_tensors
        down, up, values = _sorted(tensors[:number], len(ctx.rows))
        kept = tensors[number:]
        shape = (*grad.shape[:-1], weight.shape[1])
        grad = grad.reshape(-1, grad.shape[-1])
        grad_bias = grad.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        grad_down, grad_up, grad_values = ([None] * len(part) for part in (down, up, values))
        sources = kept[1:] if down else kept
        x = (sources[0] if ctx.origin is None else ctx.origin.remake(*sources)) if sources else None
        grad_zs = []
        if down:
            z = kept[0]
            if x is not None and torch.is_grad_enabled():  # a graph of this pass is made, in which z must have a place
                own_z = _parts(torch.cat(down).to(z.dtype) @ x.to(z.dtype).flatten(0, -2).t(), down)
                z = torch.cat([scaling * part for scaling, part in zip(ctx.scalings, own_z, strict=True)])
            grads = [grad[:, rows].to(z.dtype) for rows in ctx.rows]
            parts = zip(ctx.scalings, grads, up, strict=True)
            # (s_i g_i B_i)^T, with g_i the rows of g that change i made; like z with few rows and not few columns.
            grad_zs = [scaling * (b.to(z.dtype).t() @ part.t()) for scaling, part, b in parts]
            if x is not None:
                # dA_i = (s_i g_i B_i)^T x, all of them in one product.
                products = (torch.cat(grad_zs) @ x.to(z.dtype).flatten(0, -2)).split([len(a) for a in down])
                grad_down = [product.to(a.dtype) for product, a in zip(products, down, strict=True)]
                parts = zip(grads, _parts(z, down), up, strict=True)
                # dB_i = g_i^T s_i z_i, where z holds s_i z_i already.
                grad_up = [(own_z @ part).t().to(b.dtype) for part, own_z, b in parts]
        if x is not None and values:
            # dW of the rows is formed whole, one change after the other, and only its entries are kept.
            x = x.to(grad.dtype).flatten(0, -2)
            products = ((grad[:, rows].t() @ x).flatten()[index.long()] for rows, index in ctx.places)
            grad_values = [product.to(own.dtype) for product, own in zip(products, values, strict=True)]
        x = None  # what was made again is let go before dx, which is as large, is made
        # dx = g (W + D) + sum_i s_i (g_i B_i) A_i.
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ _with_entries(weight, ctx.places, values).to(grad.dtype)).to(ctx.dtype)
            if grad_zs and grad_x.dtype == z.dtype == down[0].dtype:
                grad_x.addmm_(torch.cat(grad_zs).t(), torch.cat(down))
            elif grad_zs:
                # The order of sums and roundings in which autograd adds up what each formula gives, the last one first.
                products = [(own_z.t() @ a.to(z.dtype)).to(ctx.dtype) for own_z, a in zip(grad_zs, down, strict=True)]
                grad_x += functools.reduce(torch.add, reversed(products))
            grad_x = grad_x.view(shape)
        return grad_x, None, grad_bias, None, None, None, None, *grad_down, *grad_up, *grad_values


def _sorted(changes: Sequence[torch.Tensor], number: int) -> tuple[Sequence[torch.Tensor], ...]:
    """All A, all B and the values of all D, of so many low-rank changes and the rest."""
    return changes[:number], changes[number : 2 * number], changes[2 * number :]


def _with_entries(
    weight: torch.Tensor, places: Sequence[tuple[slice, torch.Tensor]], values: Sequence[torch.Tensor]
) -> torch.Tensor:
    """W + D (out, in): a copy with the values added at flat indices of some of its rows."""
    if not places:
        return weight
    changed = weight.clone(memory_format=torch.contiguous_format)
    for (rows, index), own_values in zip(places, values, strict=True):
        changed[rows].view(-1).index_add_(0, index, own_values)
    return changed


def _parts(z: torch.Tensor, down: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The rows of z (sum of ranks, tokens) that belong to each A (rank, in)."""
    return z.split([len(a) for a in down])


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, in one pass over the total where the precisions are the same."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += (left @ right).to(total.dtype)


def scale_shift(y: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """scale * y + shift in the dtype of y (..., channels); scale and shift (channels,).

    On a CPU the result is kept and not y, unless a scale is too near to zero to divide by it. On another device the
    question alone would wait, at every layer, for all that was asked of the device before; there y is kept.
    """
    trained = torch.is_grad_enabled() and scale.requires_grad
    if traced() or not trained or y.device.type != "cpu" or _loses_digits(scale, shift):
        return (y * scale + shift).to(y.dtype)
    return _ScaleShift.apply(y, scale, shift)


def _loses_digits(scale: torch.Tensor, shift: torch.Tensor) -> bool:
    """Whether the result holds too few digits of y: the gradient divides by the scale, which may be near to zero."""
    return bool((scale.abs() < SMALLEST_SCALE * shift.abs().clamp(min=1)).any())


class _ScaleShift(torch.autograd.Function):
    """y' = s y + t. The gradient for s is sum(g y) = (sum(g y') - t sum(g)) / s."""

    @staticmethod
    def forward(ctx, y, scale, shift):
        result = torch.addcmul(shift, y, scale).to(y.dtype)
        ctx.save_for_backward(result, scale, shift)
        return result

    @staticmethod
    def backward(ctx, grad):
        result, scale, shift = ctx.saved_tensors
        grad_y = (grad * scale).to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad = grad.reshape(-1, grad.shape[-1])
        total = grad.sum(0, dtype=scale.dtype)
        # sum(g y') over the tokens; with y = (y' - t) / s it becomes sum(g y), and y need not be kept.
        weighted = (grad * result.reshape(grad.shape)).sum(0, dtype=scale.dtype)
        return grad_y, (weighted - shift * total) / scale, total


def own(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it if it is a part of something larger that would be kept with it."""
    part = not traced() and x.untyped_storage().nbytes() > x.numel() * x.element_size()
    return x.clone() if part and torch.is_grad_enabled() else x
