"""A wrong prediction, as figures show it."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(order=True)
class Mistake:
    """A wrong prediction.

    Args:
        confidence: probability given to the wrong class.
        index: position in the test split.
        label: true class.
        prediction: predicted class.
        image: (3, height, width), values in [0, 1].
    """

    confidence: float
    index: int
    label: int = field(compare=False)
    prediction: int = field(compare=False)
    image: Tensor = field(compare=False, repr=False)
