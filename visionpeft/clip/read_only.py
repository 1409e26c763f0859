"""Read-only tokens: they attend to a tower's own tokens, and nothing attends to them, not even they themselves.

So the tower's own tokens are exactly those of the frozen tower. They run without a gradient, and give the keys and
values of every block; the read-only tokens run with one, as queries alone. Straightforward, all tokens run together
under a mask, and all are kept for the backward pass.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from open_clip.transformer import (
    Attention,
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    VisionTransformer,
)

from visionpeft.backbones.attention import attend
from visionpeft.backbones.open_clip import join_heads, project, residual_block
from visionpeft.clip.layout import Layout
from visionpeft.clip.packing import padded
from visionpeft.clip.text import is_causal
from visionpeft.errors import UnsupportedError

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


def check_readable(clip: nn.Module, text: nn.Module) -> bool:
    """Refuse towers whose own tokens cannot be run apart from read-only ones.

    Args:
        clip: the model.
        text: its text tower.

    Returns:
        Whether the text tower is causal.

    Raises:
        UnsupportedError: the image tower is no ViT of OpenCLIP's own or pools by a learned attention, or the text tower
            has another mask than the causal one.
    """
    visual = clip.visual
    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None or not _known(visual):
        raise UnsupportedError(
            f"read-only tokens need an image tower that is a ViT of OpenCLIP's own without attention pooling, not "
            f"{type(visual).__name__}"
        )
    causal = is_causal(text)
    if (
        not _known(text)
        or getattr(text, "cls_emb", None) is not None
        or getattr(text, "use_pad_mask", False)
        or (text.attn_mask is not None and not causal)
    ):
        raise UnsupportedError(
            "read-only tokens need a text tower of OpenCLIP's own blocks, whose tokens see all others or those before "
            "them, and without a class token after the text"
        )
    return causal


def _known(tower: nn.Module) -> bool:
    """Whether the blocks of a tower are computed here as the library does."""
    return all(
        isinstance(block, ResidualAttentionBlock | CustomResidualAttentionBlock)
        and not getattr(block.attn, "scaled_cosine", False)
        for block in tower.transformer.resblocks
    )


def ordinary(blocks: Sequence[nn.Module], x: torch.Tensor, causal: bool) -> Iterator[KeysAndValues]:
    """Keys and values (batch, heads, tokens, head width) of tokens x (batch, tokens, width) in one block after another.

    Without a graph. Each block is run when its keys and values are asked for.
    """
    for index, block in enumerate(blocks):
        with torch.no_grad():
            if index == len(blocks) - 1:  # of the last block only the keys and values are read
                _, k, v = project(block.attn, block.ln_1(x))
                own = k.contiguous(), v.contiguous()
            else:
                own, x = _run(block, x, causal)
        yield own


def _run(block: nn.Module, x: torch.Tensor, causal: bool) -> tuple[KeysAndValues, torch.Tensor]:
    """Keys and values of a block, and the tokens after it."""
    read: list[torch.Tensor] = []

    def attention(h: torch.Tensor) -> torch.Tensor:
        q, k, v = project(block.attn, h)
        read.extend((k.contiguous(), v.contiguous()))  # as parts of the whole projection they would keep all of it
        return join_heads(block.attn, attend(q, *read, is_causal=causal))

    x = residual_block(block, x, lambda site, x: x, attention)
    k, v = read
    return (k, v), x


def read(
    blocks: Sequence[nn.Module],
    tokens: torch.Tensor,
    keys_and_values: Iterable[KeysAndValues],
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """Read-only tokens after the last block, (batch, tokens, width).

    Args:
        blocks: the blocks of the tower.
        tokens: as they enter, (1 or batch, tokens, width).
        keys_and_values: of each block, (batch, heads, keys, head width).
        visible: which keys there are, (batch, keys); None for all.
    """
    for block, (k, v) in zip(blocks, keys_and_values, strict=True):

        def attention(h: torch.Tensor, block=block, k=k, v=v) -> torch.Tensor:
            q = queries(block.attn, h)
            scores = q @ k.to(q.dtype).mT * q.shape[-1] ** -0.5
            if visible is not None:
                scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
            # Written out, because fused attention would also compute the gradients of keys and values.
            return join_heads(block.attn, scores.softmax(dim=-1).to(v.dtype) @ v)

        tokens = residual_block(block, tokens, lambda site, x: x, attention)
    return tokens


def queries(attention: nn.MultiheadAttention | Attention, h: torch.Tensor) -> torch.Tensor:
    """q (batch, heads, tokens, head width) alone, of what the attention reads (batch, tokens, width)."""
    width = attention.in_proj_weight.shape[0] // 3
    bias = attention.in_proj_bias
    q = F.linear(h, attention.in_proj_weight[:width], None if bias is None else bias[:width])
    q = q.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    return attention.ln_q(q) if isinstance(attention, Attention) else q


def text_keys(
    text: nn.Module, layout: Layout, dtype: torch.dtype, causal: bool, short: bool = True
) -> tuple[torch.Tensor, list[KeysAndValues]]:
    """Which keys the texts have (texts, tokens), and keys and values of their tokens in each block.

    In a causal tower a text is what is there up to its end token; otherwise all positions belong to it.

    Args:
        text: the text tower.
        layout: the texts.
        dtype: precision of the token stream.
        causal: whether the tower is.
        short: leave out the positions after the longest text, which cannot matter in a causal tower.
    """
    device = text.positional_embedding.device
    (ids,) = padded(layout, None, device)
    lengths = [len(each) if causal else layout.length for each in layout.texts]
    ids = ids[:, : max(lengths)] if short else ids
    visible = torch.arange(ids.shape[1], device=device) < torch.tensor(lengths, device=device)[:, None]
    x = text.token_embedding(ids).to(dtype) + text.positional_embedding[: ids.shape[1]].to(dtype)
    return visible, list(ordinary(text.transformer.resblocks, x, causal))


def image_tokens(visual: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """Tokens (batch, 1 + patches, width) of images (batch, 3, height, width) as they enter the first block."""
    patches = visual.conv1(images).flatten(2).mT
    first = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    x = torch.cat((first, patches), dim=1) + visual.positional_embedding.to(patches.dtype)
    return visual.ln_pre(x)
