"""How clips lie in a batch of images."""

from dataclasses import dataclass

import torch

from visionpeft.errors import ConfigurationError


@dataclass
class Frames:
    """How many consecutive images of a batch make one clip.

    A model of clips shares it with the modules of its adapters. It is a setting and not what a forward leaves behind,
    so that threads, recomputed activations and compiled code all see the same.

    Args:
        number: frames of a clip.
        interpolate: whether what was trained for another number of frames is interpolated to this one.
    """

    number: int
    interpolate: bool = False

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Map (clips * frames, ...) to (clips, frames, ...).

        Raises:
            ConfigurationError: if the images are not whole clips.
        """
        if len(x) % self.number:
            raise ConfigurationError(
                f"a batch of {len(x)} images is not whole clips of {self.number} frames; call the VideoClassifier "
                "itself, with clips (batch, channels, frames, height, width)"
            )
        return x.unflatten(0, (-1, self.number))
