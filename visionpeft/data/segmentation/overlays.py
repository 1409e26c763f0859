"""A mask over its image, as a person looks at it."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from visionpeft.data.segmentation.masks import IGNORED, Colour

STRENGTH = 0.55  # of the colour of a class, inside


def overlay(image: Image.Image, classes: np.ndarray, palette: Sequence[Colour]) -> Image.Image:
    """The image with each class in its colour, and a line where two of them meet.

    Pixels of a class in black, which usually is the background, and those that are ignored stay as they are.

    Args:
        image: RGB, of any size; it is resized to the classes.
        classes: class indices (height, width).
        palette: colour of each class.
    """
    height, width = classes.shape
    pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR), np.float64)
    colours = np.asarray(palette, np.float64)[np.where(classes == IGNORED, 0, classes)]
    shown = (colours.any(-1) & (classes != IGNORED))[..., None]
    edge = np.zeros(classes.shape, bool)
    edge[:, 1:] |= classes[:, 1:] != classes[:, :-1]
    edge[1:] |= classes[1:] != classes[:-1]
    strength = np.where(edge[..., None], 1.0, STRENGTH) * shown
    return Image.fromarray(np.rint(strength * colours + (1 - strength) * pixels).astype(np.uint8))
