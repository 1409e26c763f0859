"""What a loader gives, of this package or another's, as images and labels."""

from torch import Tensor

from visionpeft.data.dataset import Part
from visionpeft.errors import DataError


def images_of(batch: object) -> Tensor:
    """The images of a batch: itself, or the first of what is in it.

    Raises:
        DataError: it is neither.
    """
    images = batch[0] if isinstance(batch, list | tuple) and len(batch) else batch
    if not isinstance(images, Tensor):
        raise DataError(_told(batch, "images (batch, channels, height, width), or begin with them"))
    return images


def images_and_labels(batch: object) -> tuple[Tensor, Tensor, Part | None]:
    """Images and labels of a batch, and which part of a batch of several processes it is.

    Raises:
        DataError: it is no such pair.
    """
    whole = isinstance(batch, list | tuple) and (len(batch) == 2 or (len(batch) == 3 and isinstance(batch[2], Part)))
    if not whole or not isinstance(batch[0], Tensor):
        raise DataError(_told(batch, "pairs of images (batch, channels, height, width) and labels"))
    images, labels, *part = batch
    return images, labels, part[0] if part else None


def _told(batch: object, needed: str) -> str:
    found = f"a {type(batch).__name__}"
    if isinstance(batch, dict):
        found += f" of {', '.join(map(str, batch))}"
    elif isinstance(batch, list | tuple):
        found += f" of {len(batch)}: {', '.join(type(each).__name__ for each in batch)}"
    return f"batches must be {needed}, and this one is {found}; let the loader's collate_fn make them"
