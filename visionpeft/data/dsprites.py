"""dSprites, rendered from its published factors (Matthey et al. 2017, https://github.com/deepmind/dsprites-dataset).

The published array has 737,280 binary images of 64 x 64 pixels, white on black, one for each combination of
(color, shape, scale, orientation, posX, posY), the last factor varying fastest: 1 colour; square, ellipse, heart;
6 scales from 0.5 to 1; 40 orientations from 0 to 2 pi, both ends included; 32 x 32 positions.

Not published are the exact outlines, so these images resemble the originals and are not equal to them: a square of
side 17, an ellipse of semi-axes 13.7 and 6.85, and the heart (x^2 + y^2 - 1)^3 < x^2 y^3 with a unit of 8.97 pixels;
each has an area of about 294 pixels at scale 1, which makes 4.3 % of all pixels white as in the originals. They turn
clockwise, and move by one pixel for each step of posX (to the right) and posY (downwards) around the image's centre. A
pixel is white when its centre is inside.
"""

from functools import cache

import numpy as np
from PIL import Image

SHAPES = ("square", "ellipse", "heart")
FACTOR_SIZES = (1, 3, 6, 40, 32, 32)
FACTORS = ("color", "shape", "scale", "orientation", "posX", "posY")
COUNT = int(np.prod(FACTOR_SIZES))
SIZE = 64
SCALES = np.linspace(0.5, 1.0, 6)
ORIENTATIONS = np.linspace(0.0, 2 * np.pi, 40)


def factors_of(indices: np.ndarray) -> np.ndarray:
    """Factor classes, (..., 6) in the order of `FACTORS`, of indices into the published order."""
    return np.stack(np.unravel_index(indices, FACTOR_SIZES), axis=-1)


def inside(shape: str, scale: float, angle: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points lie in a sprite centred at the origin; x to the right and y downwards, in pixels.

    Args:
        shape: one of `SHAPES`.
        scale: factor on the sprite's size.
        angle: clockwise rotation in radians.
        x: horizontal coordinates.
        y: vertical coordinates, broadcast against `x`.
    """
    u = (np.cos(angle) * x + np.sin(angle) * y) / scale
    v = (np.cos(angle) * y - np.sin(angle) * x) / scale
    if shape == "square":
        return (np.abs(u) < 8.5) & (np.abs(v) < 8.5)
    if shape == "ellipse":
        return (u / 13.7) ** 2 + (v / 6.85) ** 2 < 1
    u, v = u / 8.97, -v / 8.97  # the heart's formula has its lobes up
    return (u**2 + v**2 - 1) ** 3 < u**2 * v**3


def render(indices: np.ndarray) -> np.ndarray:
    """Images of the published order at `indices` (n,): uint8 (n, 64, 64), 0 or 255."""
    _, shape, scale, orientation, column, row = np.moveaxis(factors_of(np.asarray(indices)), -1, 0)
    # A sprite moved right by one pixel is the same canvas seen through a window one pixel further left.
    return _windows()[shape, scale, orientation, 31 - row, 31 - column] * np.uint8(255)


@cache
def _windows() -> np.ndarray:
    """Every view of 64 x 64 pixels of every sprite on a canvas 31 pixels wider: bool (3, 6, 40, 32, 32, 64, 64)."""
    axis = np.arange(SIZE + 31) - (SIZE + 30) / 2
    x, y = axis[None, :], axis[:, None]
    canvases = np.array(
        [[[inside(shape, scale, angle, x, y) for angle in ORIENTATIONS] for scale in SCALES] for shape in SHAPES]
    )
    return np.lib.stride_tricks.sliding_window_view(canvases, (SIZE, SIZE), axis=(-2, -1))


class Sprites:
    """Rendered images with the label of a VTAB task.

    VTAB bins a factor of n classes to 16 labels as `floor(class * 16 / n)`: posX (32) for the location,
    orientation (40) for the orientation.

    Args:
        indices: positions in the published order, (n,).
        factor: "posX" or "orientation".
    """

    def __init__(self, indices: np.ndarray, factor: str):
        self.indices = np.asarray(indices)
        self.factor = factor
        column = FACTORS.index(factor)
        self.labels = (factors_of(self.indices)[:, column] * 16 // FACTOR_SIZES[column]).tolist()

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Image.Image:
        """RGB image, 64 x 64."""
        return Image.fromarray(render(self.indices[index : index + 1])[0]).convert("RGB")

    def name(self, index: int) -> str:
        """Position in the published order, in words."""
        return f"dsprites/{self.indices[index]}"

    def subset(self, indices: np.ndarray) -> "Sprites":
        """The images at `indices`."""
        return Sprites(self.indices[indices], self.factor)
