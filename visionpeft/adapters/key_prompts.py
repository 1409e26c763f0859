"""Deep prompts as keys and values alone.

Prompts that enter a block and leave after it reach the other tokens through their keys and values only. So they need
no place in the stream: their queries, what attention gives them and their way through the MLP are never read. And what
the whole batch shares of them is computed once. Outputs and gradients are those of prompts in the stream. Hooks on
the norm and the projections before the attention see the tokens of the backbone and not the prompts.
"""

from collections.abc import Iterable

import torch
import torch.nn as nn
from timm.layers import DropPath
from torch.nn.modules.dropout import _DropoutNd

from visionpeft.backbones.tower import BlockSites
from visionpeft.sites import TOKEN_SITES, UNSEEN, Order, is_drawn, order_of

# (site, where a branch is added) -> modules that act there in one block
Acting = dict[tuple[str, str | None], list[nn.Module]]

ON_THE_WAY = ("stream_in", "norm1", "attn_in", "k", "v", "k_norm")


class KeyPrompts:
    """Prompts of one block that are keys and values of its attention and no tokens of the stream.

    Args:
        block: the sited block, which says what its attention reads of the stream.
        prompts: the modules whose prompts they are; `prompts_for(x)` gives them (1 or batch, num_tokens, width).
        at_entrance: what acts on tokens at `stream_in` after the prompts' entrance.
        at_attention: what acts on tokens at `attn_in`.
        dropouts: the dropouts on the way to keys and values, which every sample draws for itself.
    """

    def __init__(
        self,
        block: nn.Module,
        prompts: list[nn.Module],
        at_entrance: list[nn.Module],
        at_attention: list[nn.Module],
        dropouts: list[nn.Module],
    ):
        self.block = block
        self.prompts = prompts
        self.at_entrance = at_entrance
        self.at_attention = at_attention
        self.dropouts = dropouts

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What the attention reads of the prompts (1 or batch, prompts, width), where x is what it reads of tokens."""
        # One row serves the whole batch, unless a dropout draws for each sample: then every sample has prompts of its
        # own.
        parts = [module.prompts_for(x) for module in self.prompts]
        rows = x.shape[0] if any(map(is_drawn, self.dropouts)) else max(part.shape[0] for part in parts)
        prompts = torch.cat([part.expand(rows, -1, -1) for part in parts], dim=1)
        # The way of a token from `stream_in` to the attention, without the stream: what acts after the prompts'
        # entrance, the norm before the attention with what acts on its output, then what acts at `attn_in`.
        for module in self.at_entrance:
            prompts = module(prompts)
        prompts = self.block.attention_input(prompts, UNSEEN)
        for module in self.at_attention:
            prompts = module(prompts)
        return prompts


def key_prompts(block: BlockSites, acting: Acting) -> KeyPrompts | None:
    """The prompts of a block that is not causal, where they can be keys and values alone, else None.

    They can if they leave after the block, and if everything that acts on its tokens takes each token by itself or
    leaves prompts alone. If its tokens are the pixels of a map, what reads their grid does so: prompts are none of
    them, and never meet it. Of several attentions, each would read other keys of them.
    """
    if block.further:
        return None
    if block.on_map:
        acting = {key: [m for m in modules if not getattr(m, "reads_grid", False)] for key, modules in acting.items()}
    entrance = acting.get(("stream_in", None), [])
    prompts = [module for module in entrance if order_of(module) == Order.ENTER]
    leaving = [module for module in acting.get(("stream_out", None), []) if order_of(module) == Order.LEAVE]
    if not prompts or not all(hasattr(module, "prompts_for") for module in prompts):
        return None
    # As many must leave as enter. Otherwise some would go on into the next block, and what attention and MLP make of
    # them would be read there.
    if sum(module.num_tokens for module in prompts) != sum(module.num_tokens for module in leaving):
        return None
    # In the law of order, what precedes the prompts' entrance never sees them, and what follows sees them as tokens.
    at_entrance = entrance[entrance.index(prompts[-1]) + 1 :]
    before = entrance[: entrance.index(prompts[0])]
    if not all(_leaves_alone(key, module, [*prompts, *leaving, *before]) for key, module in _each(acting)):
        return None
    # A dropout on their way must draw for each sample, as it would for tokens; `is_drawn` asks for that at each call.
    on_the_way = [m for (site, _), m in _each(acting) if site in ON_THE_WAY and m not in (*prompts, *before)]
    drawing = [part for module in on_the_way for part in module.modules() if isinstance(part, DropPath | _DropoutNd)]
    if not all(type(part) is nn.Dropout for part in drawing):  # others draw for all tokens of a sample together
        return None
    at_attention = acting.get(("attn_in", None), [])
    return KeyPrompts(block.module, prompts, _on_all(at_entrance), _on_all(at_attention), drawing)


def without_prompts(acting: Acting, prompts: Iterable[nn.Module]) -> Acting:
    """What acts in a block but for the prompts' own entering and leaving."""
    own = [*prompts]

    def stays(module: nn.Module) -> bool:
        return module not in own and order_of(module) != Order.LEAVE

    return {key: [module for module in modules if stays(module)] for key, modules in acting.items()}


def _each(acting: Acting) -> Iterable[tuple[tuple[str, str | None], nn.Module]]:
    return [(key, module) for key, modules in acting.items() for module in modules]


def _leaves_alone(key: tuple[str, str | None], module: nn.Module, own: list[nn.Module]) -> bool:
    """Whether a module does to the other tokens the same with and without prompts among them."""
    site, add = key
    if module in own or order_of(module) == Order.LEAVE_SPAN:
        return True
    if site == "kv":  # where prompts are among the keys, but in what the attention reads only as tokens
        return not getattr(module, "reads_attention_input", False)
    # Layers treat rows one by one, and so does what acts on their outputs unless it says otherwise. What acts on tokens
    # must say so, and a branch may not end on the prompts' way to the attention.
    if site not in TOKEN_SITES:
        return getattr(module, "tokenwise", True)
    alone = getattr(module, "tokenwise", False) or getattr(module, "patches_only", False)
    return alone and add not in ("stream_in", "attn_in")


def _on_all(modules: list[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if not getattr(module, "patches_only", False)]
