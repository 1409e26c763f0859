"""Drawings on white without the white around them."""

import numpy as np
from PIL import Image, ImageDraw

WHITE_TOLERANCE = 24


def cut_out(drawing: Image.Image) -> Image.Image:
    """A drawing on white as RGBA, transparent where white reaches in from the border."""
    width, height = drawing.size
    framed = Image.new("RGB", (width + 2, height + 2), "white")
    framed.paste(drawing.convert("RGB"), (1, 1))
    mark = (255, 0, 255)
    ImageDraw.floodfill(framed, (0, 0), mark, thresh=WHITE_TOLERANCE)
    opaque = (np.asarray(framed)[1:-1, 1:-1] != mark).any(-1)
    return Image.fromarray(np.dstack([np.asarray(drawing.convert("RGB")), opaque * np.uint8(255)]))
