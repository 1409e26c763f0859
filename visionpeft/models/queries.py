"""Queries of a head that go through the last blocks of a backbone, by hooks on the library's own forward."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from visionpeft.errors import UnsupportedError
from visionpeft.heads.mask_classification import attention_mask
from visionpeft.models.feature_maps import normalised_tokens, tower_of
from visionpeft.models.image_classifier import is_native

# (number of the block among the queried ones, or None after the last, queries (batch, Q, D), patches (batch, D, h, w))
# -> the patches that queries see in the block (batch, Q, h * w), None for all
Look = Callable[[int | None, Tensor, Tensor], Tensor | None]


def check_queried(blocks: Sequence[nn.Module], knows_positions: bool) -> None:
    """Refuse blocks that queries cannot go through.

    Raises:
        UnsupportedError: they take no mask, or know positions and no adapter acts in them.
    """
    for block in blocks:
        if "attn_mask" not in inspect.signature(type(block).forward).parameters:
            raise UnsupportedError(
                f"queries cannot go through blocks of class {type(block).__name__}, which take no attention mask; use "
                "another head, such as PMT"
            )
        if knows_positions and "sites" not in vars(block):
            raise UnsupportedError(
                f"{type(block).__name__} would take queries for patches, which have positions, unless an adapter acts "
                "in it; attach a method, such as LinearProbe() to train the head alone"
            )


def through_last_blocks(
    backbone: nn.Module, images: Tensor, queries: Tensor, number: int, knows_positions: bool, look: Look
) -> None:
    """Let queries (Q, width) go through the last blocks of a backbone, and look at the normalised tokens on the way.

    They enter directly before the patches, so that prompts and register tokens stay where they are.

    Args:
        backbone: as `feature_maps` takes it.
        images: (batch, 3, height, width), whose sides are multiples of the patch's.
        queries: (Q, width).
        number: of blocks.
        knows_positions: whether these blocks have positions, which stand for all patches in order.
        look: sees them before each of the blocks, and after the last.

    Raises:
        UnsupportedError: queries cannot go through these blocks, or blocks are computed again in the backward pass.
    """
    tower = tower_of(backbone)
    native = is_native(tower)
    blocks = (tower.transformer.resblocks if native else tower.blocks)[-number:]
    check_queried(blocks, knows_positions)
    if any(getattr(module, "grad_checkpointing", False) for module in tower.modules()):
        raise UnsupportedError(
            "queries go through blocks by hooks, which are gone when blocks are computed again in the backward pass; "
            "use recompute 'mlp'"
        )
    norm = tower.ln_post if native else tower.norm
    prefix = 1 if native else tower.num_prefix_tokens
    patch = tower.conv1.kernel_size if native else tower.patch_embed.patch_size
    grid = [side // size for side, size in zip(images.shape[-2:], patch, strict=True)]
    count, patches = len(queries), grid[0] * grid[1]

    def parts(tokens: Tensor) -> tuple[Tensor, Tensor]:
        ours = tokens[:, -patches - count : -patches]
        return ours, tokens[:, -patches:].transpose(1, 2).unflatten(2, grid)

    def enter(block: nn.Module, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        (x,) = args
        if index == 0:
            entering = queries.to(x.dtype).expand(len(x), -1, -1)
            x = torch.cat([x[:, :-patches], entering, x[:, -patches:]], dim=1)
        seen = look(index, *parts(norm(x)))
        if seen is not None:
            mask = attention_mask(seen, before=prefix)
            kwargs = kwargs | {"attn_mask": _of_open_clip(mask, block, x) if native else mask}
        return (x,), kwargs

    with _entering(blocks, count, enter):
        (tokens,) = normalised_tokens(backbone, images, [-1])
    look(None, *parts(tokens))


def _of_open_clip(mask: Tensor, block: nn.Module, like: Tensor) -> Tensor:
    """As OpenCLIP's blocks take a mask: additive, (batch * heads, tokens, tokens)."""
    additive = torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, float("-inf"))
    return additive.expand(-1, block.attn.num_heads, -1, -1).flatten(0, 1)


@contextmanager
def _entering(blocks: Sequence[nn.Module], count: int, enter: Callable) -> Iterator[None]:
    """Within the context, so many queries enter the first of the blocks, and what acts in them knows of it."""
    sites = [block.sites for block in blocks if "sites" in vars(block)]

    def hook(index: int) -> Callable:
        return lambda block, args, kwargs: enter(block, index, args, kwargs)

    handles = [block.register_forward_pre_hook(hook(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        for each in sites:
            each.queries = count
        yield
    finally:
        for each in sites:
            each.queries = 0
        for handle in handles:
            handle.remove()
