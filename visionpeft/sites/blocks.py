"""Sites: the named points of a transformer block at which the modules of an adapter act.

A sited block computes what the library's block computes, written out with a site at every point where the literature
puts something. This file knows neither methods nor block families. In the order in which tokens meet them, after the
site `tokens` of the tower, where embedded tokens with their positions have not yet met the norm before the blocks:

    stream_in -> norm1 -> attn_in -> q k v -> kv -> attention -> proj -> attn_out -> (+) stream_mid
              -> norm2 -> mlp_in -> fc1 -> hidden -> fc2 -> mlp_out -> (+) stream_out

These kinds of modules act:

* at a token site, `module(x) -> x` on tokens x (batch, tokens, width); at `hidden`, on what fc2 reads of each token;
* as a branch, `module(x) -> delta`: reads one token site, and delta is added at a later one of the same block, or goes
  to `module.join(x, delta) -> x` there if the module has it;
* at a layer site, `module(x, y, weight, bias) -> y`, where y = layer(x) was made by the given rows of weight and bias.
  What it does may be done in a cheaper way if it says what it changes (see `frozen_layers.linear`), or, at a norm, if
  it has `merge(weight, bias) -> weight, bias`, which the norm is then given;
* at `kv`, `module(k, v) -> k, v` on (batch, heads, tokens, head width), after rotary position and key normalisation.
  With `reads_attention_input = True` it is called with one more argument, what the attention reads: (batch, tokens,
  width);
* a carrier, for which see `carrying`, and tokens that ask, for which see `asking`.

What acts on tokens may declare, for those who run fewer tokens than the library does: `tokenwise = True`, it treats
every token by itself; `replaced_tokens = (first, stop)`, it overwrites these tokens and leaves the others alone.

What acts at a token site may also declare `patches_only = True`: it is called on the patches (batch, patches, width),
and the class, register and prompt tokens before them stay as they are. Or it may declare `located_at`: it is
called with the index of the first of some tokens as one more argument, of the patches for `located_at = "patches"`, or
of the prompts that the module `located_at` has inserted. What inserts prompts that leave after the same block may
offer `prompts_for(x) -> prompts` (1 or batch, num_tokens, width), for which see `adapters/key_prompts.py`. What gives
the MLP each token several times says so by `multiplies_tokens = True` at `mlp_in`, and puts them together at `mlp_out`.
In a block whose tokens are the pixels of a map, what declares `reads_grid = True` is called with their rows and columns
as the last argument (`maps`). What declares `reads_all_patches = True` makes something of all patches of an image, so
that padding among them would count; it is refused in a batch of a NaFlexVit that has some.
"""

from collections.abc import Callable

import torch
import torch.fx
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from visionpeft.errors import UnsupportedError
from visionpeft.sites import frozen_layers
from visionpeft.sites.carrying import CarriersOfBlock, Carrying, unpacked
from visionpeft.sites.class_token import ClassTokenOnly
from visionpeft.sites.layers import SitedLayer
from visionpeft.sites.masks import padding, widened

# Traced by torch.fx, a mask that is not there has no shape to ask for; said where it is called, as torch.fx wants it.
torch.fx.wrap("widened")


class Sites:
    """What acts inside one block while the active adapters are in force.

    Args:
        num_prefix_tokens: class and register tokens, which stay before inserted prompts.
        causal: whether the tower masks the future, so that inserted tokens must keep to it.
    """

    def __init__(self, num_prefix_tokens: int, causal: bool):
        self.num_prefix_tokens = num_prefix_tokens
        self.causal = causal
        self.extra_tokens = 0  # prompts among the tokens between stream_in and stream_out
        self.queries = 0  # tokens of a head, while they are there: directly before the patches, with masks of their own
        self.acting: dict[str, tuple[nn.Module, ...]] = {}
        self.branches: dict[str, tuple[tuple[nn.Module, str], ...]] = {}
        self.key_prompts: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.carriers: CarriersOfBlock | None = None
        self.asking: Callable | None = None
        self.class_token_only: ClassTokenOnly | None = None
        self.recompute_mlp = False
        self.layout: object = None  # that of the block, for its own forward
        self.reading_all: str | None = None  # what acts here and reads all patches, where some may be padding

    def enter(self) -> "Flow":
        """Start one pass through the block."""
        return Flow(self) if self.carriers is None else CarryingFlow(self)

    @property
    def first_patch(self) -> int:
        """Number of tokens before the patches while they are in the block."""
        return self.num_prefix_tokens + self.extra_tokens + self.queries

    def acted_on(self, *token_sites: str) -> bool:
        """Whether anything changes the tokens at one of some token sites: it acts there, or its branch ends there."""
        ends = {add for branches in self.branches.values() for _, add in branches}
        return any(site in self.acting or site in ends for site in token_sites)

    def call(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Call a layer of the block, with what acts on its output."""
        return layer(x)

    def without(self, left_out: Callable[[nn.Module], bool]) -> "Sites":
        """The same sites without some of the modules that act on tokens."""
        sites = Sites(self.num_prefix_tokens, self.causal)
        sites.branches = self.branches
        sites.acting = {site: tuple(m for m in modules if not left_out(m)) for site, modules in self.acting.items()}
        return sites

    def prompts(self, x: torch.Tensor) -> torch.Tensor | None:
        """What the attention reads of prompts that are no tokens, or None; x is what it reads of tokens."""
        return None if self.key_prompts is None else self.key_prompts(x)

    @property
    def kept(self) -> slice | None:
        """The tokens that ask in the attention of this block and go on after it, None for all."""
        only = self.class_token_only is not None and not self.class_token_only.others_are_read()
        return slice(0, 1) if only else None

    def followed(self, x: torch.Tensor) -> torch.Tensor:
        """Those of tokens x (batch, tokens, width) that ask in the attention of this block and go on after it."""
        return x if self.kept is None else x[:, self.kept]

    def mlp(self, branch: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """The MLP branch of the stream x, of which only x is kept for the backward pass where that is asked for."""
        if self.recompute_mlp and torch.is_grad_enabled():
            return checkpoint(branch, x, use_reentrant=False)
        return branch(x)

    def kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        h: torch.Tensor | None = None,
        remake: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply what acts on keys and values (batch, heads, tokens, head width).

        Args:
            k: the keys.
            v: the values.
            h: what the attention reads (batch, tokens, width).
            remake: makes keys and values from h as the backbone does.
        """
        for module in self.acting.get("kv", ()):
            k, v = act_on_kv(module, k, v, h)
        if self.asking is not None:
            self.asking(k, v, handed_out(h, "a token that asks"), remake)
        return k, v

    def mask(self, mask: torch.Tensor | None, is_causal: bool = False) -> torch.Tensor | None:
        """An attention mask or bias (..., N, N) for the tokens of this block, as (..., tokens that ask, tokens)."""
        if self.class_token_only is not None and is_causal:
            raise UnsupportedError("class_token_only is for attention without is_causal; switch it off with economise")
        if mask is not None and self.reading_all is not None and self._counts_padding(mask):
            raise UnsupportedError(
                f"{self.reading_all} reads all patches of an image, and those of a batch of several sizes are filled "
                "up with some that count for nothing; show it images of one size together"
            )
        mask = self.widen(mask)
        return mask if mask is None or self.kept is None else mask[..., self.kept, :]

    def _counts_padding(self, mask: torch.Tensor) -> bool:
        """Whether some patches are padding by a mask, or which are is not to be known: in a graph, or where the block
        has fewer tokens than the mask.
        """
        entering = (getattr(module, "module", module) for module in self.acting.get("stream_in", ()))
        fewer = any(getattr(module, "narrows_tokens", False) for module in entering)
        return fewer or frozen_layers.traced() or bool(padding(mask).any())

    def widen(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Widen an attention mask or bias (..., N, N) by the prompts that travel through this block.

        The new rows and columns sit after the prefix tokens. They are open (0, or True for a boolean mask), but to keys
        that no token sees, which are padding; in a causal tower a prompt sees the prefix and the prompts before it, and
        the prefix does not see prompts.
        """
        if self.extra_tokens == 0:
            return mask
        return widened(mask, self.extra_tokens, self.num_prefix_tokens, self.causal)


def act_on_kv(module: Callable, k: torch.Tensor, v: torch.Tensor, h: torch.Tensor | None):
    """Call what acts at `kv`, with what the attention reads if it wants that, too.

    Raises:
        UnsupportedError: it wants it, and the attention does not give it.
    """
    if not getattr(module, "reads_attention_input", False):
        return module(k, v)
    return module(k, v, handed_out(h, type(module).__name__))


def handed_out(h: torch.Tensor | None, reader: str) -> torch.Tensor:
    """What the attention reads, for something that reads it, too.

    Raises:
        UnsupportedError: the attention does not give it.
    """
    if h is None:
        raise UnsupportedError(
            f"{reader} reads what the attention reads, which the sited attention of this backbone does not hand out: "
            "it must call sites.kv(k, v, h)"
        )
    return h


class Untouched(Sites):
    """Sites at which nothing acts, also not on the outputs of layers whose class is swapped."""

    def call(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Compute a layer as the library does."""
        return super(SitedLayer, layer).forward(x) if isinstance(layer, SitedLayer) else layer(x)


UNTOUCHED = Untouched(num_prefix_tokens=0, causal=False)


class Unseen(Sites):
    """Sites whose layers act on prompts that are no tokens: hooks, which see the tokens, are not called for them."""

    def call(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Compute a layer, with what acts on its output."""
        return layer.forward(x)


UNSEEN = Unseen(num_prefix_tokens=0, causal=False)


class OnPatches:
    """Lets a module act on the patches alone.

    Args:
        module: maps patches (batch, patches, width) to the same shape.
        first: number of tokens before the patches.
        sites: of the block, whose queries come before the patches, too, while they are there.
    """

    def __init__(self, module: nn.Module, first: int, sites: Sites | None = None):
        self.module = module
        self.first = first
        self.sites = sites

    @property
    def reads_grid(self) -> bool:
        """Whether the module does."""
        return getattr(self.module, "reads_grid", False)

    def __call__(self, x: torch.Tensor, *grid: tuple[int, int]) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        first = self.first if self.sites is None else self.first + self.sites.queries
        return torch.cat((x[:, :first], self.module(x[:, first:], *grid)), dim=1)


class Located:
    """Tells a module where the tokens begin that it treats apart.

    Args:
        module: maps (x, first), or as a branch with `join` also (x, delta, first).
        start: index of the first of those tokens.
        sites: of the block, whose queries come before the patches, too, while they are there; None for prompts.
    """

    def __init__(self, module: nn.Module, start: int, sites: Sites | None = None):
        self.module = module
        self.start = start
        self.sites = sites

    @property
    def first(self) -> int:
        """Index of the first of those tokens now."""
        return self.start if self.sites is None else self.start + self.sites.queries

    @property
    def reads_grid(self) -> bool:
        """Whether the module does."""
        return getattr(self.module, "reads_grid", False)

    def __call__(self, x: torch.Tensor, *grid: tuple[int, int]) -> torch.Tensor:
        """Act on tokens (batch, tokens, width)."""
        return self.module(x, self.first, *grid)

    def join(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """End the branch of the module."""
        return self.module.join(x, delta, self.first) if hasattr(self.module, "join") else x + delta


def join(module: nn.Module | OnPatches | Located, x: torch.Tensor, delta) -> torch.Tensor:
    """Let the branch of a module end in x (batch, tokens, width)."""
    return module.join(x, delta) if hasattr(module, "join") else x + delta


class Flow:
    """One pass of tokens through one block. Carries each branch from where it reads to where it is added."""

    def __init__(self, sites: Sites):
        self.sites = sites
        self.carried: dict[str, list[tuple[nn.Module, torch.Tensor]]] = {}

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        """End the branches that end at this site, the last to start first, then act on x (batch, tokens, width), then
        start new branches.
        """
        for module, delta in reversed(self.carried.pop(site, ())):
            x = join(module, x, delta)
        for module in self.sites.acting.get(site, ()):
            x = self.act(module, x)
        for module, add in self.sites.branches.get(site, ()):
            self.carried.setdefault(add, []).append((module, self.act(module, x)))
        return x

    def act(self, module: nn.Module | OnPatches | Located, x: torch.Tensor) -> torch.Tensor:
        """Let a module act on tokens x (batch, tokens, width)."""
        return module(x)


class CarryingFlow(Flow):
    """One pass of tokens, and of what is carried beside them, through one block."""

    states: list  # of the carriers, from the entrance to the exit

    def __call__(self, site: str, x: torch.Tensor | Carrying) -> torch.Tensor | Carrying:
        """Likewise, with the carriers first at the entrance of the block and last at its exit."""
        carriers = self.sites.carriers
        if site == "stream_in":
            x, carried = unpacked(x, carriers.first)
            self.states = carriers.enter(x, carried)
        x = super().__call__(site, x)
        if site == "stream_out":
            x, carried = carriers.leave(x, self.states)
            return x if carriers.last else Carrying(x, carried)
        return x
