"""Image features of a frozen tower, kept by what they depend on: the content of the image and of the tower."""

import torch
from torch import Tensor, nn

from visionpeft.adapters.adapters import has_adapters
from visionpeft.caching.content_cache import DEFAULT_BYTES, ContentCache, Fingerprint, arithmetic
from visionpeft.clip.learner import Learner
from visionpeft.clip.model import acting_adapters
from visionpeft.errors import StorageError


class FeatureCache(ContentCache):
    """Image features, found again by the bytes of the image, the weights of tower and adapters, and the precision.

    Args:
        max_bytes: most bytes of features that are kept.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES):
        super().__init__(max_bytes)
        self._tower = Fingerprint()

    def image_features(self, learner: Learner, images: Tensor) -> Tensor:
        """Image features (batch, features) of images (batch, 3, height, width), without a graph.

        Args:
            learner: one whose image features do not depend on what is trained.
            images: the images as the tower takes them.

        Raises:
            StorageError: images without pixels, which are known by their names alone, are not known.
        """

        def compute(images: Tensor) -> Tensor:
            if images.isnan().any():
                raise StorageError(
                    "images came without pixels, because their features are kept, and others were asked for: a hook "
                    "has changed the batch, or the frozen weights were changed while training; keep no features "
                    "(--model.cache_features false)"
                )
            return learner.image_features(images)

        return self.rows(self._source(learner, images.device), images, compute)

    def known_images(self, learner: Learner, device: torch.device) -> frozenset[bytes]:
        """What the images are known by whose features are kept, as they would be computed now.

        Args:
            learner: as above.
            device: where the images would be.
        """
        source = self._source(learner, device)
        return frozenset(identity for other, identity in self.kept if other == source)

    def hash_again(self) -> None:
        """Hash the tower at the next use even if its tensors do not say that they were written to."""
        self._tower.forget()

    def _source(self, learner: Learner, device: torch.device) -> str:
        """What a feature depends on besides the image."""
        acting = " ".join(acting_adapters(learner.clip))
        tower = self._tower.of(image_tensors(learner.clip))
        return f"{type(learner).image_features.__qualname__} {tower} {acting} {arithmetic(device)}"


def image_tensors(clip: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the image tower and of what adapters have in it, by name."""
    tensors = {**dict(clip.visual.named_parameters()), **dict(clip.visual.named_buffers())}
    if has_adapters(clip):
        own = (*clip.peft.named_parameters(), *clip.peft.named_buffers())
        tensors |= {f"peft.{name}": tensor for name, tensor in own if ".visual." in name}
    return tensors
