"""Masks as COCO writes them, runs of pixels or polygons, by the mask functions of faster-coco-eval."""

from types import ModuleType

import numpy as np

from visionpeft.errors import ConfigurationError


def encoded(mask: np.ndarray) -> dict:
    """A mask (height, width) as compressed runs, "size" and "counts" as text: what JSON takes."""
    runs = _functions().encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode()}


def decoded(outline: list | dict, size: tuple[int, int]) -> np.ndarray:
    """bool (height, width) of polygons, each [x, y, x, y, ...] in pixels, of runs, or of compressed runs.

    What lies outside the image is left out. A pixel belongs to several polygons as to one.

    Raises:
        ValueError: it is none of these, or the runs are of an image of another size.
    """
    height, width = size
    functions = _functions()
    if isinstance(outline, dict):
        if list(outline.get("size", ())) != [height, width]:
            raise ValueError(f"runs of an image of {outline.get('size')} (height, width), not {[height, width]}")
        runs = {"size": [height, width], "counts": outline["counts"]}
        runs = functions.frPyObjects(runs, height, width) if isinstance(runs["counts"], list) else runs
        return functions.decode([runs])[:, :, 0].astype(bool)
    usable = [polygon for polygon in outline if len(polygon) >= 6]
    if not usable:
        return np.zeros((height, width), bool)
    return functions.decode(functions.frPyObjects(usable, height, width)).any(2)


def _functions() -> ModuleType:
    """The mask functions.

    Raises:
        ConfigurationError: faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval.core import mask
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "masks of objects need faster-coco-eval; install it with pip install 'visionpeft[detection]'"
        ) from error
    return mask
