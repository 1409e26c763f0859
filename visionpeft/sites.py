"""Sites: the named points of a transformer block at which the modules of an adapter act.

A sited block computes what the library's block computes, written out with a site at every point where the literature
puts something. This file knows neither methods nor block families. In the order in which tokens meet them, behind the
site `tokens` of the tower, where embedded tokens with their positions have not yet met the norm in front of the blocks:

    stream_in -> norm1 -> attn_in -> q k v -> kv -> attention -> proj -> attn_out -> (+) stream_mid
              -> norm2 -> mlp_in -> fc1 -> fc2 -> mlp_out -> (+) stream_out

Three kinds of modules act:

* at a token site, `module(x) -> x` on tokens x (batch, tokens, width);
* as a branch, `module(x) -> delta`: reads one token site, and delta is added at a later one of the same block;
* at a layer site, `module(x, y, weight, bias) -> y`, where y = layer(x) was made by the given rows of weight and bias;
* at `kv`, `module(k, v) -> k, v` on (batch, heads, tokens, head width), after rotary position and key normalisation.

What acts on tokens may declare, for those who run fewer tokens than the library does: `tokenwise = True`, it treats
every token by itself; `replaced_tokens = (first, stop)`, it overwrites these tokens and leaves the others alone.

What acts at a token site may also declare `patches_only = True`: it is called on the patches (batch, patches, width),
and the class, register and prompt tokens in front of them stay as they are.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn as nn

TOKEN_SITES = ("stream_in", "attn_in", "attn_out", "stream_mid", "mlp_in", "mlp_out", "stream_out")


class Order(IntEnum):
    """Law of order among the modules of one site: it, and not the order of attaching, decides who acts first."""

    REPLACE = 0  # what overwrites tokens of the backbone by their position
    ENTER_SPAN = 1  # prompts that stay for several blocks
    ENTER = 2  # prompts of this block alone
    WEIGHT = 3  # what changes the weight or bias of a layer
    OUTPUT = 4  # what rescales or shifts the output of a layer
    TOKENS = 5  # everything else
    LEAVE = 6
    LEAVE_SPAN = 7


@dataclass(frozen=True)
class Placement:
    """One module of an adapter at one site.

    Args:
        tower: name of the tower, "visual" or "text".
        block: index of the block, or None for a layer of the tower itself (patch embedding, final norm).
        site: a token site, a layer site such as "q", or "kv".
        module: what acts there; owned by the adapter.
        add: for a branch, the later token site of the same block at which the module's output is added.
    """

    tower: str
    block: int | None
    site: str
    module: nn.Module
    add: str | None = None


@dataclass(frozen=True)
class Shared:
    """A module that several placements of one tower use; the adapter owns it under this name."""

    tower: str
    name: str
    module: nn.Module


class Sites:
    """What acts inside one block while the active adapters are in force.

    Args:
        num_prefix_tokens: class and register tokens, which stay in front of inserted prompts.
        causal: whether the tower masks the future, so that inserted tokens must keep to it.
    """

    def __init__(self, num_prefix_tokens: int, causal: bool):
        self.num_prefix_tokens = num_prefix_tokens
        self.causal = causal
        self.extra_tokens = 0  # prompts among the tokens between stream_in and stream_out
        self.acting: dict[str, tuple[nn.Module, ...]] = {}
        self.branches: dict[str, tuple[tuple[nn.Module, str], ...]] = {}

    def enter(self) -> "Flow":
        """Start one pass through the block."""
        return Flow(self)

    @property
    def first_patch(self) -> int:
        """Number of tokens in front of the patches while they are in the block."""
        return self.num_prefix_tokens + self.extra_tokens

    def call(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Call a layer of the block, with what acts on its output."""
        return layer(x)

    def without(self, left_out: Callable[[nn.Module], bool]) -> "Sites":
        """The same sites without some of the modules that act on tokens."""
        sites = Sites(self.num_prefix_tokens, self.causal)
        sites.branches = self.branches
        sites.acting = {site: tuple(m for m in modules if not left_out(m)) for site, modules in self.acting.items()}
        return sites

    def layer(self, site: str, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Apply what acts on the output y of the layer rows (weight, bias) that read x."""
        for module in self.acting.get(site, ()):
            y = module(x, y, weight, bias)
        return y

    def kv(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply what acts on keys and values (batch, heads, tokens, head width)."""
        for module in self.acting.get("kv", ()):
            k, v = module(k, v)
        return k, v

    def widen(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Widen an attention mask or bias (..., N, N) by the prompts that travel through this block.

        The new rows and columns sit behind the prefix tokens. They are open (0, or True for a boolean mask); in a
        causal tower a prompt sees the prefix and the prompts before it, and the prefix does not see prompts.
        """
        extra, at = self.extra_tokens, self.num_prefix_tokens
        if mask is None or extra == 0:
            return mask
        boolean = mask.dtype == torch.bool
        opened, closed = (True, False) if boolean else (0.0, float("-inf"))
        columns = mask.new_full((*mask.shape[:-1], extra), opened)
        rows = mask.new_full((*mask.shape[:-2], extra, mask.shape[-1] + extra), opened)
        if self.causal:
            columns[..., :at, :] = closed
            rows[..., at + extra :] = closed
            future = torch.ones(extra, extra, dtype=torch.bool, device=mask.device).triu(1)
            rows[..., at : at + extra].masked_fill_(future, closed)
        mask = torch.cat((mask[..., :at], columns, mask[..., at:]), dim=-1)
        return torch.cat((mask[..., :at, :], rows, mask[..., at:, :]), dim=-2)


class Untouched(Sites):
    """Sites at which nothing acts, also not on the outputs of layers whose class is swapped."""

    def call(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Compute a layer as the library does."""
        return super(SitedLayer, layer).forward(x) if isinstance(layer, SitedLayer) else layer(x)


UNTOUCHED = Untouched(num_prefix_tokens=0, causal=False)


class OnPatches:
    """Lets a module act on the patches alone.

    Args:
        module: maps patches (batch, patches, width) to the same shape.
        first: number of tokens in front of the patches.
    """

    def __init__(self, module: nn.Module, first: int):
        self.module = module
        self.first = first

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        return torch.cat((x[:, : self.first], self.module(x[:, self.first :])), dim=1)


class Flow:
    """One pass of tokens through one block. Carries each branch from where it reads to where it is added."""

    def __init__(self, sites: Sites):
        self.sites = sites
        self.carried: dict[str, list[torch.Tensor]] = {}

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        """Add the branches that end at this site, then act on x (batch, tokens, width), then start new branches."""
        for delta in self.carried.pop(site, ()):
            x = x + delta
        for module in self.sites.acting.get(site, ()):
            x = module(x)
        for module, add in self.sites.branches.get(site, ()):
            self.carried.setdefault(add, []).append(module(x))
        return x


class SitedLayer:
    """Mixed into the class of a layer that is called (linear, convolution, normalisation): each module of `entering`
    maps its input, y = layer(x), then each module of `acting` maps (x, y, weight, bias) to the next y.
    """

    acting: tuple[nn.Module, ...] = ()
    entering: tuple[nn.Module, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer and what acts on its input and output."""
        for module in self.entering:
            x = module(x)
        y = super().forward(x)
        bias = getattr(self, "bias", None)
        for module in self.acting:
            y = module(x, y, self.weight, bias)
        return y

    def __reduce_ex__(self, protocol):
        # The class is made on demand, so it is pickled as the class it was made from.
        original = type(self).__mro__[2]
        return _empty_sited_layer, (original,), self.__dict__


@functools.cache
def sited_layer_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class of a layer with `SitedLayer` mixed in."""
    return type(f"Sited{original.__name__}", (SitedLayer, original), {})


def _empty_sited_layer(original: type[nn.Module]) -> nn.Module:
    cls = sited_layer_class(original)
    return cls.__new__(cls)
