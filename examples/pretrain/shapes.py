"""Plain shapes on transparent ground: polygons, stars, arrows, crosses, bars, sectors and rings, of no meaning."""

import math
import random

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

SIDE, FINER = 64, 4  # drawn so many times larger and made smaller, for smooth edges


def around(corners: int, radii: list[float]) -> list[tuple[float, float]]:
    """Points at equal angles around the origin, the first above it, at radii that take turns."""
    angles = [2 * math.pi * corner / corners for corner in range(corners)]
    return [
        (radii[i % len(radii)] * math.sin(angle), -radii[i % len(radii)] * math.cos(angle))
        for i, angle in enumerate(angles)
    ]


def outline(kind: str, draw: random.Random) -> list[tuple[float, float]]:
    """Corners of a random shape of a kind, in [-1, 1] x [-1, 1], y downwards."""
    wide, high = draw.uniform(0.3, 0.95), draw.uniform(0.1, 0.95)
    match kind:
        case "polygon":
            return around(draw.randint(3, 8), [0.95])
        case "irregular polygon":
            corners = draw.randint(3, 8)
            return around(corners, [draw.uniform(0.3, 0.95) for _ in range(corners)])
        case "star":
            return around(2 * draw.randint(3, 8), [0.95, draw.uniform(0.25, 0.7)])
        case "bar":
            return [(-wide, -high), (wide, -high), (wide, high), (-wide, high)]
        case "trapezium":
            top = draw.uniform(0, 0.8) * wide
            return [(-top, -high), (top, -high), (wide, high), (-wide, high)]
        case "arrow":
            shaft, neck = draw.uniform(0.1, 0.9) * wide, draw.uniform(-0.5, 0.5)
            right = [(0, -0.95), (wide, neck), (shaft, neck), (shaft, 0.95)]
            return [*right, *((-x, y) for x, y in reversed(right))]
        case "cross":
            arm = draw.uniform(0.1, 0.3)
            quarter = [(arm, 0.95), (arm, arm), (0.95, arm)]
            right = [*((x, -y) for x, y in quarter), *reversed(quarter)]
            return [*right, *((-x, y) for x, y in reversed(right))]
    raise ValueError(kind)


def shape(draw: random.Random) -> Image.Image:
    """A random shape in a random colour, RGBA."""
    side = SIDE * FINER
    picture = Image.new("RGBA", (side, side))
    pen = ImageDraw.Draw(picture)
    colour = tuple(draw.randint(0, 255) for _ in range(3))
    kinds = ["polygon", "irregular polygon", "star", "bar", "trapezium", "arrow", "cross", "sector", "ring"]
    kind = draw.choice(kinds)
    if kind in ("sector", "ring"):
        high = draw.uniform(0.2, 0.95)
        box = [side / 2 * (1 + corner) for corner in (-0.95, -high, 0.95, high)]
        if kind == "sector":
            pen.pieslice(box, -90, -90 + draw.uniform(60, 330), fill=colour)
        else:
            pen.ellipse(box, outline=colour, width=draw.randint(side // 20, side // 6))
    else:
        pen.polygon([(side / 2 * (1 + x), side / 2 * (1 + y)) for x, y in outline(kind, draw)], fill=colour)
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def shapes(count: int, seed: int = 0) -> Tensor:
    """Random shapes (count, 4, 64, 64) uint8, RGBA."""
    draw = random.Random(seed)
    return torch.from_numpy(np.stack([np.array(shape(draw)) for _ in range(count)])).permute(0, 3, 1, 2).contiguous()
