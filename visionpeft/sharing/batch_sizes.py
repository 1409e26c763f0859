"""In which sizes a batch may be computed so that the bits of a row do not depend on the size.

A linear algebra library chooses its kernel by the shapes of a product, and two kernels add in different orders. Whether
that shows depends on the processor, the number of threads and the model, so it is measured and not assumed.
"""

import warnings
from collections.abc import Callable, Sequence

import torch

DRAWS = 3


def sizes_that_agree(compute: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor, most: int) -> frozenset[int]:
    """Of the powers of two below `most`, those in which each row is, bit for bit, what it is in a batch of `most`.

    `most` itself is always among them. Warns if a row depends even on its place in a batch of `most`, against which
    nothing can be done here.

    Args:
        compute: maps images (n, ...) to outputs (n, ...), for any n up to `most`.
        like: images (n, ...), of whose shape random ones are drawn.
        most: the largest batch.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(most, *like.shape[1:], generator=generator).to(like.device, like.dtype)
    whole = compute(images)
    if not torch.equal(compute(images.roll(1, 0)), whole.roll(1, 0)):
        warnings.warn(
            f"on this machine the bits of an answer depend on its row in a batch of {most}; the last digits of an "
            "answer may differ when it is asked for again",
            stacklevel=2,
        )
    smaller = (2**power for power in range(most.bit_length()) if 2**power < most)
    agree = [size for size in smaller if torch.equal(compute(images[:size]), whole[:size])]
    for _ in range(DRAWS - 1):  # few values may be equal by chance
        images = torch.randn(images.shape, generator=generator).to(like.device, like.dtype)
        whole = compute(images)
        agree = [size for size in agree if torch.equal(compute(images[:size]), whole[:size])]
    return frozenset((*agree, most))


def rows_agree(
    mixed: Callable[[torch.Tensor], torch.Tensor],
    alone: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    like: torch.Tensor,
    most: int,
) -> bool:
    """Whether row i of `mixed`, which is that of number i modulo n, has the bits that the whole batch has by it alone.

    Args:
        mixed: maps images (most, ...) to outputs, whose rows several take turns to compute.
        alone: those n by themselves.
        like: images (n, ...), of whose shape random ones are drawn.
        most: the size of the batch.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(most, *like.shape[1:], generator=generator).to(like.device, like.dtype)
    rows = mixed(images)
    for number, each in enumerate(alone):
        own = each(images)[number :: len(alone)]
        theirs = rows[number :: len(alone)]
        # Rows of fewer values than those of others are filled up.
        width = min(own.shape[-1], theirs.shape[-1])
        if not torch.equal(own[..., :width], theirs[..., :width]):
            return False
    return True


def filled(images: torch.Tensor, rows: int) -> torch.Tensor:
    """The images with the last one repeated, up to this number of rows."""
    missing = rows - len(images)
    return torch.cat([images, images[-1:].expand(missing, *images.shape[1:])]) if missing else images
