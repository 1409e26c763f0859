"""What methods share whose modules carry values from block to block."""

from visionpeft.backbones.tower import Tower
from visionpeft.errors import UnsupportedError
from visionpeft.methods.parts.base import Method


def image_tower(method: Method, tower: Tower) -> None:
    """Refuse a tower without patches.

    Raises:
        UnsupportedError: naming the method and the tower.
    """
    if tower.patch_size is None:
        raise UnsupportedError(
            f"{type(method).__name__} runs a side path beside the blocks of an image tower, and the {tower.name} tower "
            "has no patches"
        )
