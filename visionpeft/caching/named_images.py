"""Images that know where they come from, so that what was computed of them is found without reading their pixels.

To find an image by its pixels they have to be on the host and be hashed, which takes longer than a GPU takes to run a
ViT on them. Whoever makes a batch knows a shorter name of each image: which file, as it was when it was read, and what
was done to it. A name holds for the very tensor it was given to, and only until that is written to; any other tensor,
such as one that a hook has made of it, has no names and is known by its pixels.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

ATTRIBUTE = "_visionpeft_names"


class Batch(tuple):
    """A pair (images, labels) whose images keep their names on their way to a device.

    Args:
        pair: images (batch, ...) and labels (batch, ...).
        names: one name for each image, by which no other pixels than its own can be known; None without, as where
            Lightning has made other tensors of both.
    """

    names: Sequence[bytes] | None

    def __new__(cls, pair: Iterable[Tensor], names: Sequence[bytes] | None = None) -> "Batch":
        """Name the images."""
        images, labels = pair
        if names is not None:
            images = name_images(_noticing(images), names)
        made = super().__new__(cls, (images, labels))
        made.names = names
        return made

    def __reduce__(self):
        """From the process that loads to the one that trains."""
        return Batch, (tuple(self), self.names)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; Lightning moves it by this."""
        device = torch.device(device)
        later = device.type not in ("cpu", "mps")  # as Lightning moves tensors: where the copy may run beside the host
        images, labels = (each.to(device, non_blocking=later) for each in self)
        return Batch((images, labels), self._still_valid())

    def pin_memory(self) -> "Batch":
        """The batch in memory from which it is copied to a GPU beside other work; PyTorch's loader calls this."""
        return Batch((each.pin_memory() for each in self), self._still_valid())

    def _still_valid(self) -> Sequence[bytes] | None:
        """The names, unless somebody has written to the images."""
        return None if self.names is None else names_of(self[0])


def name_images(images: Tensor, names: Sequence[bytes]) -> Tensor:
    """Give images their names, and the same tensor back; it must not be one of inference mode."""
    setattr(images, ATTRIBUTE, (images._version, tuple(names)))
    return images


def names_of(images: Tensor) -> Sequence[bytes] | None:
    """The names of images whose pixels are those they were given for, else None."""
    version, names = getattr(images, ATTRIBUTE, (None, None))
    return None if names is None or images._version != version else names


def _noticing(images: Tensor) -> Tensor:
    """The images in a tensor that says whether it was written to, which those made in inference mode do not."""
    if not images.is_inference():
        return images
    with torch.inference_mode(False):
        return images.clone()
