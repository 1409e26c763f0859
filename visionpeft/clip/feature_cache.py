"""Image features of a frozen tower, kept by what they depend on: the content of the image and of the tower."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from visionpeft.attach import has_adapters
from visionpeft.clip.learner import Learner
from visionpeft.clip.model import acting_adapters

DEFAULT_BYTES = 512 * 2**20


class FeatureCache:
    """Image features, found again by the bytes of the image, the weights of tower and adapters, and the precision.

    A changed image, weight or precision is another key, so that a stale feature is never given out. What is kept is
    bounded: when it is full, features of other towers make room, and then further ones are worked out each time.

    Args:
        max_bytes: most bytes of features that are kept.

    Attributes:
        full: a feature could not be kept.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES):
        self.max_bytes = max_bytes
        self.bytes = 0
        self.full = False
        self.kept: dict[tuple[str, bytes], Tensor] = {}
        self._tower: tuple[list, str] | None = None

    def image_features(self, learner: Learner, images: Tensor) -> Tensor:
        """Image features (batch, features) of images (batch, 3, height, width), without a graph.

        Args:
            learner: one whose image features do not depend on what is trained.
            images: the images as the tower takes them.
        """
        source = self._source(learner, images.device)
        keys = [(source, content) for content in contents(images)]
        missing = [index for index, key in enumerate(keys) if key not in self.kept]
        found = {key: self.kept[key] for key in keys if key in self.kept}
        if missing:
            # Outside of inference mode, whose tensors could not take part in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                for index, feature in zip(missing, learner.image_features(images[missing]), strict=True):
                    found[keys[index]] = feature
                    self._keep(keys[index], feature.clone())
        return torch.stack([found[key] for key in keys])

    def hash_again(self) -> None:
        """Hash the tower at the next use even if its tensors do not say that they were written to."""
        self._tower = None

    def _keep(self, key: tuple[str, bytes], feature: Tensor) -> None:
        if key in self.kept:  # the same image twice in a batch
            return
        if self.bytes + feature.nbytes > self.max_bytes:
            self.kept = {other: value for other, value in self.kept.items() if other[0] == key[0]}
            self.bytes = sum(value.nbytes for value in self.kept.values())
        self.full = self.bytes + feature.nbytes > self.max_bytes
        if not self.full:
            self.kept[key] = feature
            self.bytes += feature.nbytes

    def _source(self, learner: Learner, device: torch.device) -> str:
        """What a feature depends on besides the image."""
        tensors = image_tensors(learner.clip)
        state = [acting_adapters(learner.clip)]
        state += [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors.values()]
        if self._tower is None or self._tower[0] != state:
            self._tower = state, f"{fingerprint(tensors)} {' '.join(acting_adapters(learner.clip))}"
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return f"{type(learner).image_features.__qualname__} {self._tower[1]} {device} {autocast}"


def contents(images: Tensor) -> list[bytes]:
    """A hash of the shape, type and bytes of each of (batch, ...) images."""
    kind = hashlib.blake2b(f"{tuple(images.shape[1:])} {images.dtype}".encode(), digest_size=16).digest()
    rows = images.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    return [hashlib.blake2b(row, digest_size=16, key=kind).digest() for row in rows]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the names, shapes, types and values of tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def image_tensors(clip: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the image tower and of what adapters have in it, by name."""
    tensors = {**dict(clip.visual.named_parameters()), **dict(clip.visual.named_buffers())}
    if has_adapters(clip):
        own = (*clip.peft.named_parameters(), *clip.peft.named_buffers())
        tensors |= {f"peft.{name}": tensor for name, tensor in own if ".visual." in name}
    return tensors
