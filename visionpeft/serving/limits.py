"""What one request, and all of them together, may cost the machine that serves."""

from dataclasses import dataclass

from visionpeft.errors import ConfigurationError


@dataclass(frozen=True)
class Limits:
    """Bounds of a service.

    Args:
        body: most bytes of a request.
        pixels: most pixels of an image, which are counted before it is decoded.
        queue: most requests for predictions that are read, waiting or computed at a time.
        seconds: a request for a prediction is answered within this time, or refused.
        class_names: most classes that a request may name.
        texts: lists of class names whose text features are kept for each learner.
    """

    body: int = 10 * 2**20
    pixels: int = 32_000_000
    queue: int = 256
    seconds: float = 30.0
    class_names: int = 1000
    texts: int = 32

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigurationError(f"the limit {name} must be above 0, not {value}")
