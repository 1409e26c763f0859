"""Image features of a frozen tower, kept by what they depend on: the content of the image and of the tower."""

import hashlib

import torch
from torch import Tensor, nn

from visionpeft.clip.learner import Learner

DEFAULT_BYTES = 512 * 2**20


class FeatureCache:
    """Unit image features, found again by the bytes of the image, the weights of the image tower and the precision.

    A changed image, weight or precision is another key, so that a stale feature is never given out. What is kept is
    bounded: when it is full, features of other towers make room, and then further ones are worked out each time.

    Args:
        max_bytes: most bytes of features that are kept.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES):
        self.max_bytes = max_bytes
        self.bytes = 0
        self.features: dict[tuple[str, bytes], Tensor] = {}
        self._tower: tuple[list, str] | None = None

    def image_features(self, learner: Learner, images: Tensor) -> Tensor:
        """Unit image features (batch, features) of images (batch, 3, height, width), without a graph.

        Args:
            learner: one whose image features do not depend on what is trained.
            images: the images as the tower takes them.
        """
        place = self._place(learner.clip.visual, images.device)
        keys = [(place, content) for content in contents(images)]
        missing = [index for index, key in enumerate(keys) if key not in self.features]
        found = {key: self.features[key] for key in keys if key in self.features}
        if missing:
            # Outside of inference mode, whose tensors could not take part in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                new = learner.image_features(images[missing].clone())
            for index, feature in zip(missing, new, strict=True):
                found[keys[index]] = feature
                self._keep(keys[index], feature, place)
        return torch.stack([found[key] for key in keys])

    def _keep(self, key: tuple[str, bytes], feature: Tensor, place: str) -> None:
        if key in self.features:  # the same image twice in a batch
            return
        if self.bytes + feature.nbytes > self.max_bytes:
            self.features = {other: kept for other, kept in self.features.items() if other[0] == place}
            self.bytes = sum(kept.nbytes for kept in self.features.values())
        if self.bytes + feature.nbytes <= self.max_bytes:
            self.features[key] = feature.clone()
            self.bytes += feature.nbytes

    def _place(self, tower: nn.Module, device: torch.device) -> str:
        """What a feature depends on besides the image."""
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return f"{self._fingerprint(tower)} {device} {autocast}"

    def _fingerprint(self, tower: nn.Module) -> str:
        """Hash of the tower's content, worked out again when a tensor was replaced or written to."""
        state = [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors_of(tower).values()]
        if self._tower is None or self._tower[0] != state:
            self._tower = state, fingerprint(tower)
        return self._tower[1]

    def forget_tower(self) -> None:
        """Hash the tower again at the next use, whatever its tensors say of themselves."""
        self._tower = None


def contents(images: Tensor) -> list[bytes]:
    """A hash of the shape, type and bytes of each image."""
    kind = f"{tuple(images.shape[1:])} {images.dtype}".encode()
    rows = images.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    return [
        hashlib.blake2b(row, digest_size=16, key=hashlib.blake2b(kind, digest_size=16).digest()).digest()
        for row in rows
    ]


def fingerprint(module: nn.Module) -> str:
    """A hash of the names, shapes, types and values of all parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors_of(module).items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
