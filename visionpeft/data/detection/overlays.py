"""What was found drawn into its image, as a person looks at it."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from visionpeft.data.segmentation.masks import Colour

STRENGTH = 0.45  # of the colour of a mask
LEGIBLE = 400  # pixels of the longer side, for the texts


def drawn(
    image: Image.Image,
    boxes: np.ndarray,
    labels: Sequence[int],
    texts: Sequence[str],
    palette: Sequence[Colour],
    masks: np.ndarray | None = None,
) -> Image.Image:
    """The image with a frame and a text for each object, in the colour of its class, the first on top.

    Smaller images are enlarged, by a whole number, until texts can be read beside what they name.

    Args:
        image: RGB.
        boxes: (n, 4), x0, y0, x1, y1 in pixels.
        labels: class indices (n,).
        texts: what is written at each frame, (n,).
        palette: colour of each class.
        masks: bool (n, height, width); tinted where there are any.
    """
    order = range(len(boxes) - 1, -1, -1)
    times = max(1, -(-LEGIBLE // max(image.size)))
    enlarged = image.convert("RGB").resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)
    pixels = np.asarray(enlarged, np.float64).copy()
    for index in order if masks is not None else ():
        inside = masks[index].repeat(times, axis=0).repeat(times, axis=1)
        pixels[inside] = STRENGTH * np.array(palette[labels[index]]) + (1 - STRENGTH) * pixels[inside]
    picture = Image.fromarray(np.rint(pixels).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    line = max(1, round(max(picture.size) / 320))
    font = ImageFont.load_default(max(9, round(max(picture.size) / 48)))
    for index in order:
        colour = tuple(palette[labels[index]])
        x0, y0, x1, y1 = (float(value) for value in times * boxes[index])
        pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=line)
        _, _, right, bottom = pen.textbbox((0, 0), texts[index], font=font)
        at_x = min(max(0, x0), max(0, picture.width - right - 2))
        at_y = max(0, y0 - bottom - 2)
        pen.rectangle((at_x, at_y, at_x + right + 2, at_y + bottom + 1), fill=colour)
        dark = sum(weight * value for weight, value in zip((0.299, 0.587, 0.114), colour, strict=True)) < 140
        pen.text((at_x + 1, at_y), texts[index], fill=(255, 255, 255) if dark else (0, 0, 0), font=font)
    return picture
