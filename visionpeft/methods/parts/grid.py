"""The patches of an image as the grid that they are, for methods that need to know where a patch lies."""

import torch

from visionpeft.backbones.tower import Tower
from visionpeft.errors import UnsupportedError
from visionpeft.methods.parts.base import Method, require


def require_patches(method: Method, tower: Tower) -> None:
    """Refuse a tower of words.

    Raises:
        UnsupportedError: the tower has no patches.
    """
    if tower.patch_size is None:
        raise UnsupportedError(f"{type(method).__name__} needs patches, and the {tower.name} tower has none")


def grid_of(method: Method, tower: Tower) -> tuple[int, int]:
    """Rows and columns of patches: the `grid` of the method, or else that of images of the tower's own size.

    Raises:
        UnsupportedError: the tower has no patches, or takes images of any size and the method has no `grid`.
    """
    require_patches(method, tower)
    grid = method.grid or tower.grid_size
    if grid is None:
        raise UnsupportedError(
            f"{type(method).__name__} needs the grid of patches, but this model takes images of any size; give "
            "grid=(rows, columns)"
        )
    return tuple(grid)


def grid_in_block(method: Method, tower: Tower, block: int) -> tuple[int, int] | None:
    """`grid_of` for what acts in a block; None for a block that tells it the grid of every image.

    Raises:
        ConfigurationError: the method has a `grid`, and the block tells it.
    """
    if not tower.blocks[block].on_map:
        return grid_of(method, tower)
    require(method.grid is None, method, "the blocks of this model tell the grid of every image; leave grid out")
    return None


def as_images(patches: torch.Tensor, grid: tuple[int, int] | None, method: str) -> torch.Tensor:
    """Patches (batch, rows * columns, channels) as images (batch, channels, rows, columns).

    Args:
        patches: the patches, row by row.
        grid: rows and columns.
        method: name of the method, for the error.

    Raises:
        UnsupportedError: there are more or fewer patches than the grid has, or nothing tells the grid.
    """
    if grid is None:
        raise UnsupportedError(f"{method} needs the grid of patches, and nothing tells it")
    rows, columns = grid
    if patches.shape[1] != rows * columns:
        raise UnsupportedError(
            f"{method} acts on a grid of {rows} x {columns} patches, but there are {patches.shape[1]}; use images of "
            "the size it was attached for"
        )
    return patches.transpose(1, 2).unflatten(2, grid)


def as_patches(images: torch.Tensor) -> torch.Tensor:
    """Images (batch, channels, rows, columns) as patches (batch, rows * columns, channels)."""
    return images.flatten(2).transpose(1, 2)
