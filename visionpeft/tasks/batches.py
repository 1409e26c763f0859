"""What a loader gives, of this package or another's, as images and labels."""

import torch
from torch import Tensor, nn

from visionpeft.data.dataset import Part
from visionpeft.errors import DataError

PATCHES = "patches"
Images = Tensor | dict  # the second of timm's NaFlex loaders: patches with their places
COLOURS = (1, 3, 4)  # of pixels that lie last, as NumPy and Pillow have them: gray, colour, with transparency


def images_of(batch: object) -> Images:
    """The images of a batch: itself, or the first of what is in it.

    Raises:
        DataError: it is neither, or these are no images that a backbone takes.
    """
    images = batch[0] if isinstance(batch, list | tuple) and len(batch) else batch
    if not _are_images(images):
        raise DataError(_told(batch, "images (batch, channels, height, width), or begin with them"))
    _check_pixels(images)
    return images


def images_and_labels(batch: object) -> tuple[Images, Tensor, Part | None]:
    """Images and labels of a batch, and which part of a batch of several processes it is.

    Raises:
        DataError: it is no such pair, or its images are none that a backbone takes.
    """
    whole = isinstance(batch, list | tuple) and (len(batch) == 2 or (len(batch) == 3 and isinstance(batch[2], Part)))
    if not whole or not _are_images(batch[0]):
        raise DataError(_told(batch, "pairs of images (batch, channels, height, width) and labels"))
    images, labels, *part = batch
    _check_pixels(images)
    return images, labels, part[0] if part else None


def check_double(model: nn.Module) -> None:
    """Refuse float64 images for a model of which no weight is float64.

    Raises:
        DataError: it has none.
    """
    if not any(parameter.dtype == torch.float64 for parameter in model.parameters()):
        raise DataError(
            "images of a batch are torch.float64, as arithmetic of NumPy leaves them, and the model computes in fewer "
            "bits; let the loader's transform make them float32, or train with --trainer.precision 64-true"
        )


def unread_pixels(images: Images) -> str | None:
    """Which of the images of a batch have pixels that are no finite numbers, None if there are none."""
    if not isinstance(images, Tensor) or bool(images.isfinite().all()):
        return None
    wrong = [index for index, image in enumerate(images) if not image.isfinite().all()]
    return f"{len(wrong)} of the {len(images)} images of a batch, the first at {wrong[0]},"


def number_of(images: Images) -> int:
    """How many there are."""
    return len(images[PATCHES] if isinstance(images, dict) else images)


def _are_images(images: object) -> bool:
    return isinstance(images, Tensor) or (isinstance(images, dict) and PATCHES in images)


def _check_pixels(images: Images) -> None:
    if not isinstance(images, Tensor) or images.ndim < 4:  # in the place of images whose features are kept, names
        return
    found = f"{images.dtype} {tuple(images.shape)}"
    if not images.is_floating_point():
        raise DataError(
            f"images of a batch must be floating-point numbers, normalised as the backbone wants them, and these are "
            f"{found}; let the loader's transform do it, as torchvision's v2.ToDtype(torch.float32, scale=True) and "
            "v2.Normalize do"
        )
    # Fewer columns than any patch has: no image is as narrow, with more channels than colours.
    if images.ndim == 4 and images.shape[-1] in COLOURS and images.shape[1] not in COLOURS:
        raise DataError(
            f"images of a batch must be (batch, channels, height, width), and these are {found}, with the channels "
            "last; let the loader's transform put them first"
        )


def _told(batch: object, needed: str) -> str:
    found = f"a {type(batch).__name__}"
    if isinstance(batch, dict):
        found += f" of {', '.join(map(str, batch))}"
    elif isinstance(batch, list | tuple):
        found += f" of {len(batch)}: {', '.join(type(each).__name__ for each in batch)}"
    return f"batches must be {needed}, and this one is {found}; let the loader's collate_fn make them"
