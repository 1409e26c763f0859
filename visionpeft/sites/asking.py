"""Tokens that ask and are not asked: they attend to the keys and values of a block's own tokens, which never see them.

Such a token passes the block as any other does, but for its key and its value, which nobody reads. So it is run apart:
the block's own forward, on those tokens alone, with the keys and values of the others in the place of theirs. The
others are then exactly what they are without it, and where nothing before them is trained, the backbone keeps nothing
for a backward pass.

Of a frozen attention, keys and values are as wide as three of its tokens. They are made again in the backward pass from
what the attention reads.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from visionpeft.sites.blocks import Sites, Untouched
from visionpeft.sites.frozen_layers import autocast_dtype, traced

# Makes keys and values (batch, heads, tokens, head width) from what the attention reads (batch, tokens, width).
Remake = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Borrowed(threading.local):
    """Whose keys and values the tokens that ask attend to, in one thread.

    Attributes:
        kv: keys and values (batch, heads, tokens, head width).
    """

    kv: tuple[torch.Tensor, torch.Tensor] | None = None

    def __reduce__(self):
        return Borrowed, ()  # of a copy: it is in no pass


class Borrowing(Untouched):
    """Sites of a block that runs tokens that ask: its attention reads keys and values of others, without positions."""

    def __init__(self):
        super().__init__(num_prefix_tokens=0, causal=False)
        self.borrowed = Borrowed()

    def kv(self, k, v, h=None, remake=None) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of others."""
        return self.borrowed.kv

    def mask(self, mask: torch.Tensor | None, is_causal: bool = False) -> None:
        """None: what asks has no place among the other tokens."""
        return


class OnlyKeys(Untouched):
    """Sites of an attention of which only keys and values are wanted: one token asks."""

    @property
    def kept(self) -> slice:
        """The first token."""
        return slice(0, 1)


ONLY_KEYS = OnlyKeys(num_prefix_tokens=0, causal=False)


class Asker:
    """Runs tokens that ask through one block.

    Args:
        block: a block that computes with the modules and tensors of the backbone's, of its sited class.
        sites: those of that block.
    """

    def __init__(self, block: nn.Module, sites: Borrowing):
        self.block = block
        self.sites = sites

    def __call__(
        self, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor, h: torch.Tensor, remake: Remake | None
    ) -> torch.Tensor:
        """Tokens (batch, asking tokens, width) that leave the block, of tokens x (1 or batch, asking tokens, width).

        Args:
            x: the tokens.
            k: keys of the block's own tokens (batch, heads, tokens, head width).
            v: their values.
            h: what their attention reads (batch, tokens, width).
            remake: makes k and v from h.
        """
        if remake is not None and not (k.requires_grad or v.requires_grad or h.requires_grad or traced()):
            k = k.detach()  # another object, which alone is marked
            k.remade_from = h, remake
        self.sites.borrowed.kv = k, v
        try:
            return self.block(x)
        finally:
            self.sites.borrowed.kv = None


def asker_of(block: nn.Module, attention: nn.Module, classes: dict[nn.Module, type[nn.Module]]) -> Asker:
    """An `Asker` of a block of the backbone.

    Args:
        block: the block.
        attention: its attention.
        classes: the sited classes of both, and the own classes of others that have another one now.
    """
    sites = Borrowing()
    return Asker(_twin(block, (block, attention), classes, sites), sites)


def _twin(module: nn.Module, sited: tuple, classes: dict, sites: Sites) -> nn.Module:
    """A module of the same tensors, which nobody watches, and in which no dropout is drawn."""
    kind = classes.get(module, type(module))
    twin = kind.__new__(kind)
    state = {key: value for key, value in vars(module).items() if key not in ("sites", "acting", "entering")}
    # The dicts of parameters and buffers are those of the module, so that what is exchanged there is exchanged here.
    state |= {key: OrderedDict() for key, value in state.items() if "_hooks" in key and isinstance(value, dict)}
    state["_modules"] = {
        name: None if child is None else _twin(child, sited, classes, sites) for name, child in module._modules.items()
    }
    state["training"] = False
    if module in sited:
        state["sites"] = sites
    twin.__dict__.update(state)
    return twin


def attend_again(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
    """softmax(q k^T / sqrt(d)) v for tokens that ask, keeping neither k nor v, where that is possible; else None."""
    remade_from = getattr(k, "remade_from", None)
    if remade_from is None or not (torch.is_grad_enabled() and q.requires_grad):
        return None
    h, remake = remade_from
    return _AttendAgain.apply(q, h, k, v, remake, autocast_dtype(h))


class _AttendAgain(torch.autograd.Function):
    """Attention of a few queries q (1 or batch, heads, queries, d) to frozen keys and values."""

    @staticmethod
    def forward(ctx, q, h, k, v, remake, autocast):
        ctx.save_for_backward(q, h)
        ctx.remake, ctx.autocast = remake, autocast
        return _shares(q, k) @ v

    @staticmethod
    def backward(ctx, grad):
        q, h = ctx.saved_tensors
        with torch.autocast(h.device.type, ctx.autocast, enabled=ctx.autocast is not None):
            k, v = ctx.remake(h)
        k, v, grad = k.to(q.dtype), v.to(q.dtype), grad.to(q.dtype)
        shares = _shares(q, k)
        grad_shares = grad @ v.mT
        grad_scores = shares * (grad_shares - (shares * grad_shares).sum(-1, keepdim=True))
        grad_q = grad_scores @ k * q.shape[-1] ** -0.5
        return grad_q.sum_to_size(q.shape), None, None, None, None, None


def _shares(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)
