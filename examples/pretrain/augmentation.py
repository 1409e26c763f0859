"""Random poses, colours and backgrounds for drawings with transparency."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def uniform(count: int, low: float, high: float) -> Tensor:
    """A vector of ``count`` random numbers between two bounds."""
    return torch.empty(count).uniform_(low, high)


def chance(count: int, probability: float) -> Tensor:
    """A mask of shape (count, 1, 1, 1) that is true with the given probability."""
    return (torch.rand(count) < probability).view(-1, 1, 1, 1)


def posed(images: Tensor, turn: Tensor, log_size: Tensor, log_aspect: Tensor, shift: Tensor, tiles: Tensor) -> Tensor:
    """Rotate by angles, scale, stretch and shift images (batch, channels, height, width) with premultiplied colour.

    The result is repeated as often in both directions as ``tiles`` (batch,) says.
    """
    cos, sin = turn.cos(), turn.sin()
    rotate_back = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)  # (batch, 2, 2)
    stretch_back = torch.exp(-torch.stack([log_size + log_aspect, log_size - log_aspect], 1))
    inverse = stretch_back[:, :, None] * rotate_back
    matrices = torch.cat([inverse, -inverse @ shift[:, :, None]], 2)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    tiles = tiles.view(-1, 1, 1, 1)
    grid = torch.where(tiles > 1, torch.remainder(grid * tiles + 1, 2) - 1, grid)
    return F.grid_sample(images, grid, align_corners=False)


@dataclass
class Views:
    """Drawings in random poses and colours on random backgrounds.

    Attributes:
        images: (batch, 3, 64, 64) from 0 to 1.
        pose: cosine and sine of the angle, position and log size (batch, 5).
        any_pose: which of them (batch,) are white on black, turned and small, as pictograms of everything.
        styles: which of them (batch, 2) are silhouettes, and patterns: the same drawing again and again.
    """

    images: Tensor
    pose: Tensor
    any_pose: Tensor
    styles: Tensor


def augment(images: Tensor, flip: Tensor) -> Views:
    """Random poses, colours and backgrounds, mostly white, for RGBA images (batch, 4, 64, 64) uint8.

    Rotations are small, since the orientation of a drawing is part of what it shows; but a quarter of the images are
    white silhouettes on black in any pose.

    Args:
        images: drawings on transparent ground.
        flip: which of them (batch,) may be mirrored.
    """
    count = len(images)
    x = images.float() / 255
    x = torch.where(chance(count, 0.5) & flip.view(-1, 1, 1, 1), x.flip(-1), x)
    x[:, :3] *= x[:, 3:]  # premultiplied, so that interpolation does not mix in the colour of transparent pixels

    any_pose = torch.rand(count) < 0.25
    tiles = torch.where((torch.rand(count) < 0.015) & ~any_pose, torch.randint(2, 5, (count,)), 1)
    angle = torch.where(any_pose, uniform(count, -math.pi, math.pi), uniform(count, -0.15, 0.15))
    log_size = torch.where(any_pose, uniform(count, -1.8, -0.1), uniform(count, -0.35, 0.1))
    log_aspect = uniform(count, -0.12, 0.12)
    shift = [torch.where(any_pose, uniform(count, -0.5, 0.5), uniform(count, -0.12, 0.12)) for _ in "xy"]
    shift = torch.stack(shift, 1)
    x = posed(x, angle, log_size, log_aspect, shift, tiles)

    color, alpha = x[:, :3], x[:, 3:]
    color = color * (1 + 0.15 * torch.randn(count, 3, 1, 1))
    color = torch.where(chance(count, 0.08), color.mean(1, keepdim=True), color)
    silhouette = chance(count, 0.05)
    color = torch.where(silhouette, alpha * torch.rand(count, 3, 1, 1) * chance(count, 0.5), color)
    background = torch.where(chance(count, 0.3), torch.zeros(1), torch.rand(count, 3, 1, 1))
    background = torch.where(chance(count, 0.7) | silhouette, torch.ones(1), background)
    pictogram = any_pose.view(-1, 1, 1, 1)
    color, background = torch.where(pictogram, alpha, color), torch.where(pictogram, torch.zeros(1), background)
    silhouette = silhouette | pictogram
    x = (color + (1 - alpha) * background).clamp(0, 1)
    x = torch.where(chance(count, 0.03) & ~silhouette, 1 - x, x)
    pose = torch.cat([torch.stack([angle.cos(), angle.sin()], 1), 3 * shift, 3 * log_size[:, None]], 1)
    return Views(x, pose, any_pose, torch.stack([silhouette.flatten(), tiles > 1], 1))
