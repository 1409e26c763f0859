"""Scenes of drawings on a texture, composed when they are asked for: image and exact mask follow from a seed.

A scene is a square of colour noise of three grain sizes with 2 to 4 drawings on it, each of .3 to .6 of its side, half
of them mirrored, anywhere, also over the border; later ones lie over earlier ones. A pixel belongs to a drawing where
the drawing is at least half opaque. The class of each drawing is drawn first, evenly, and then one of its drawings.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from visionpeft.data.cut_out import cut_out
from visionpeft.data.ordering import mix
from visionpeft.errors import ConfigurationError
from visionpeft.files import shipped

BACKGROUND = "background"
OBJECTS = (2, 4)
SIZES = (0.3, 0.6)  # of the side
GRAINS = ((4, 0.5), (16, 0.3), (128, 0.2))  # cells to a side, weight
CONTRAST = 0.6


@functools.cache
def drawings(split: str) -> Mapping[str, list[Path]]:
    """The drawings of each class that scenes of a split are made of; no two splits share one (datasets/scenes)."""
    folder = shipped("datasets")
    chosen = json.loads((folder / "scenes" / "drawings.json").read_text(encoding="utf-8"))[split]
    return {name: [folder / "clipart" / path for path in paths] for name, paths in chosen.items()}


def class_names() -> list[str]:
    """Background and the seven classes of drawings."""
    return [BACKGROUND, *drawings("train")]


class Scenes:
    """The scenes of a split, as a data module reads them.

    Args:
        split: "train", "val" or "test".
        indices: numbers of the scenes; all that are asked for make a sequence without end.
        side: height and width in pixels.
        seed: of the scenes.
    """

    def __init__(self, split: str, indices: np.ndarray, side: int, seed: int):
        self.split, self.indices, self.side, self.seed = split, np.asarray(indices), side, seed
        self.labels = range(len(self.indices))

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Image.Image:
        """RGB image."""
        return self._composed(index)[0]

    def mask(self, index: int) -> np.ndarray:
        """Class indices int64 (side, side)."""
        return self._composed(index)[1]

    def name(self, index: int) -> str:
        """Which scene."""
        return f"{self.split} scene {self.indices[index]}"

    def subset(self, indices: np.ndarray) -> "Scenes":
        """The scenes at `indices`."""
        return Scenes(self.split, self.indices[indices], self.side, self.seed)

    def _composed(self, index: int) -> tuple[Image.Image, np.ndarray]:
        return compose(self.split, int(self.indices[index]), self.side, self.seed)


def compose(split: str, number: int, side: int, seed: int) -> tuple[Image.Image, np.ndarray]:
    """A scene: RGB image of `side` x `side` pixels, and class indices int64 (side, side)."""
    image, places, labels = compose_objects(split, number, side, seed)
    return image, np.array([0, *(label + 1 for label in labels)])[places]


@functools.lru_cache(maxsize=64)  # image and mask of a scene are asked for one after the other
def compose_objects(split: str, number: int, side: int, seed: int) -> tuple[Image.Image, np.ndarray, tuple[int, ...]]:
    """A scene by its objects, of which some may be hidden.

    Returns:
        RGB image of `side` x `side` pixels; which object a pixel shows, int64 (side, side), 0 for none and i for the
        i-th; and the class of each object, from 0.
    """
    key = seed, ("train", "val", "test").index(split), number
    chosen = list(drawings(split).values())
    few, many = OBJECTS
    count = few + _integers(many - few + 1, *key, 0)
    image = Image.fromarray(_texture(side, *key))
    places, labels = np.zeros((side, side), np.int64), []
    for which in range(1, count + 1):
        label = _integers(len(chosen), *key, which, 0)
        drawing = _sprite(chosen[label][_integers(len(chosen[label]), *key, which, 1)])
        small, large, x, y, mirrored = (*SIZES, *(_uniform(*key, which, draw) for draw in (2, 3, 4)))
        length = round(side * (small + (large - small) * _uniform(*key, which, 5)))
        sprite = _scaled(drawing, length, mirrored < 0.5)
        # At least half of it lies in the scene in each direction.
        corner = round(x * side - sprite.width / 2), round(y * side - sprite.height / 2)
        image.paste(sprite, corner, sprite.getchannel("A"))
        opaque = Image.new("L", (side, side))
        opaque.paste(sprite.getchannel("A"), corner)
        places[np.asarray(opaque) >= 128] = which
        labels.append(label)
    places.setflags(write=False)  # it is kept
    return image, places, tuple(labels)


def _scaled(drawing: Image.Image, length: int, mirrored: bool) -> Image.Image:
    factor = length / max(drawing.size)
    size = max(1, round(drawing.width * factor)), max(1, round(drawing.height * factor))
    sprite = drawing.convert("RGBa").resize(size, Image.Resampling.BICUBIC).convert("RGBA")
    return sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else sprite


@functools.cache
def _sprite(path: Path) -> Image.Image:
    sprite = cut_out(Image.open(path))
    return sprite.crop(sprite.getbbox())


def _texture(side: int, *key: int) -> np.ndarray:
    picture = np.zeros((side, side, 3))
    for level, (cells, weight) in enumerate(GRAINS):
        draws = (mix(*key, 1000 + level, np.arange(cells * cells * 3)) >> np.uint64(56)).astype(np.uint8)
        noise = Image.fromarray(draws.reshape(cells, cells, 3)).resize((side, side), Image.Resampling.BICUBIC)
        picture += weight * np.asarray(noise, np.float64)
    tint = np.array([_uniform(*key, 2000, channel) for channel in range(3)])
    return np.rint(64 + 128 * tint + CONTRAST * (picture - 127.5)).clip(0, 255).astype(np.uint8)


def _uniform(*seeds: int) -> float:
    """A number in [0, 1) that depends on the seeds alone."""
    return float((mix(*seeds)[0] >> np.uint64(11)) / 2.0**53)


def _integers(below: int, *seeds: int) -> int:
    return int(_uniform(*seeds) * below)


def splits_of_scenes(
    kind: type[Scenes], train: int, val: int, test: int, side: int, scene_seed: int
) -> dict[str, Scenes]:
    """So many scenes of each split; none of a split without scenes.

    Raises:
        ConfigurationError: scenes that are too small, or too few.
    """
    if side < 16 or min(train, test) < 1 or val < 0:
        raise ConfigurationError(
            f"scenes of side {side} need at least 16 pixels, and train {train} and test {test} at least one scene"
        )
    counts = {"train": train, "val": val, "test": test}
    return {name: kind(name, np.arange(count), side, scene_seed) for name, count in counts.items() if count}


def about_scenes(val: int, side: int, scene_seed: int) -> dict[str, object]:
    """What a run records of its scenes."""
    selected_on = "val" if val else None
    return {"trained_on": "train", "selected_on": selected_on, "side": side, "scene_seed": scene_seed}
