"""What a loader gives, of this package or another's, as images and labels."""

from torch import Tensor

from visionpeft.data.dataset import Part
from visionpeft.errors import DataError

PATCHES = "patches"
Images = Tensor | dict  # the second of timm's NaFlex loaders: patches with their places


def images_of(batch: object) -> Images:
    """The images of a batch: itself, or the first of what is in it.

    Raises:
        DataError: it is neither.
    """
    images = batch[0] if isinstance(batch, list | tuple) and len(batch) else batch
    if not _are_images(images):
        raise DataError(_told(batch, "images (batch, channels, height, width), or begin with them"))
    return images


def images_and_labels(batch: object) -> tuple[Images, Tensor, Part | None]:
    """Images and labels of a batch, and which part of a batch of several processes it is.

    Raises:
        DataError: it is no such pair.
    """
    whole = isinstance(batch, list | tuple) and (len(batch) == 2 or (len(batch) == 3 and isinstance(batch[2], Part)))
    if not whole or not _are_images(batch[0]):
        raise DataError(_told(batch, "pairs of images (batch, channels, height, width) and labels"))
    images, labels, *part = batch
    return images, labels, part[0] if part else None


def number_of(images: Images) -> int:
    """How many there are."""
    return len(images[PATCHES] if isinstance(images, dict) else images)


def _are_images(images: object) -> bool:
    return isinstance(images, Tensor) or (isinstance(images, dict) and PATCHES in images)


def _told(batch: object, needed: str) -> str:
    found = f"a {type(batch).__name__}"
    if isinstance(batch, dict):
        found += f" of {', '.join(map(str, batch))}"
    elif isinstance(batch, list | tuple):
        found += f" of {len(batch)}: {', '.join(type(each).__name__ for each in batch)}"
    return f"batches must be {needed}, and this one is {found}; let the loader's collate_fn make them"
