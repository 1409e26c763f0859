"""Random poses, colours and backgrounds for drawings with transparency."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def uniform(count: int, low: float, high: float) -> Tensor:
    """A vector of ``count`` random numbers between two bounds."""
    return torch.empty(count).uniform_(low, high)


def chance(count: int, probability: float) -> Tensor:
    """A mask of shape (count, 1, 1, 1) that is true with the given probability."""
    return (torch.rand(count) < probability).view(-1, 1, 1, 1)


def posed(images: Tensor, turn: Tensor, log_size: Tensor, log_aspect: Tensor, shift: Tensor, tiles=None) -> Tensor:
    """Rotate by angles, scale, stretch and shift images (batch, channels, height, width) with premultiplied colour.

    With ``tiles`` (batch,), the result is repeated so often in both directions.
    """
    cos, sin = turn.cos(), turn.sin()
    rotate_back = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)  # (batch, 2, 2)
    stretch_back = torch.exp(-torch.stack([log_size + log_aspect, log_size - log_aspect], 1))
    inverse = stretch_back[:, :, None] * rotate_back
    matrices = torch.cat([inverse, -inverse @ shift[:, :, None]], 2)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    if tiles is not None:
        many = (tiles > 1).view(-1, 1, 1, 1)
        grid = torch.where(many, torch.remainder(grid * tiles.view(-1, 1, 1, 1) + 1, 2) - 1, grid)
    return F.grid_sample(images, grid, align_corners=False)


def augment(images: Tensor) -> tuple[Tensor, Tensor]:
    """Random pose, colour and background for RGBA images (batch, 4, 64, 64) uint8.

    Rotations are small, since the orientation of a drawing is part of what it shows. A quarter of the images are white
    silhouettes on black in any pose, which the layout head tells apart.

    Returns:
        Normalised RGB images (batch, 3, 64, 64) and layouts (batch, 53): cosine and sine of the angle,
        position, log size, thumbnail.
    """
    count = len(images)
    x = images.float() / 255
    x = torch.where(chance(count, 0.5), x.flip(-1), x)
    x[:, :3] *= x[:, 3:]  # premultiplied, so that interpolation does not mix in the colour of transparent pixels

    any_pose = torch.rand(count) < 0.25
    angle = torch.where(any_pose, uniform(count, -math.pi, math.pi), uniform(count, -0.1, 0.1))
    log_size = torch.where(any_pose, uniform(count, -1.1, -0.1), uniform(count, -0.2, 0.15))
    log_aspect = uniform(count, -0.1, 0.1)
    shift = [torch.where(any_pose, uniform(count, -0.45, 0.45), uniform(count, -0.15, 0.15)) for _ in "xy"]
    shift = torch.stack(shift, 1)
    x = posed(x, angle, log_size, log_aspect, shift)

    color, alpha = x[:, :3], x[:, 3:]
    color = color * (1 + 0.1 * torch.randn(count, 3, 1, 1))
    color = torch.where(chance(count, 0.05), color.mean(1, keepdim=True), color)
    color = torch.where(chance(count, 0.05), alpha * torch.rand(count, 3, 1, 1).round(decimals=1), color)  # silhouettes
    background = torch.where(chance(count, 0.4), torch.zeros(1), torch.rand(count, 3, 1, 1))
    background = torch.where(chance(count, 0.6), torch.ones(1), background)
    silhouette = any_pose.view(-1, 1, 1, 1)
    color, background = torch.where(silhouette, alpha, color), torch.where(silhouette, torch.zeros(1), background)
    x = (color + (1 - alpha) * background).clamp(0, 1)
    x = torch.where(chance(count, 0.03) & ~silhouette, 1 - x, x)
    x = (x - 0.5) / 0.5
    layout = [torch.stack([angle.cos(), angle.sin()], 1), 3 * shift, 3 * log_size[:, None]]
    return x, torch.cat([*layout, F.avg_pool2d(x, 16).flatten(1)], 1)


def augment_with_styles(images: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
    """Random pose, colour and background for RGBA images (batch, 4, 64, 64) uint8, mostly on white.

    Args:
        images: drawings on transparent ground.
        flip: which of them (batch,) may be mirrored.

    Returns:
        RGB images (batch, 3, 64, 64) from 0 to 1, and which of them (batch, 2) became a silhouette, and a pattern: the
        same drawing again and again.
    """
    count = len(images)
    x = images.float() / 255
    x = torch.where(chance(count, 0.5) & flip.view(-1, 1, 1, 1), x.flip(-1), x)
    x[:, :3] *= x[:, 3:]
    tiles = torch.where(torch.rand(count) < 0.015, torch.randint(2, 5, (count,)), 1)
    pose = uniform(count, -0.15, 0.15), uniform(count, -0.35, 0.1), uniform(count, -0.15, 0.15)
    x = posed(x, *pose, torch.stack([uniform(count, -0.12, 0.12) for _ in "xy"], 1), tiles)

    color, alpha = x[:, :3], x[:, 3:]
    color = color * (1 + 0.15 * torch.randn(count, 3, 1, 1))
    color = torch.where(chance(count, 0.08), color.mean(1, keepdim=True), color)
    silhouette = chance(count, 0.05)
    color = torch.where(silhouette, alpha * torch.rand(count, 3, 1, 1) * chance(count, 0.5), color)
    background = torch.where(chance(count, 0.3), torch.zeros(1), torch.rand(count, 3, 1, 1))
    white = chance(count, 0.75) | silhouette
    x = (color + (1 - alpha) * torch.where(white, torch.ones(1), background)).clamp(0, 1)
    x = torch.where(chance(count, 0.03) & ~silhouette, 1 - x, x)
    return x, torch.stack([silhouette.flatten(), tiles > 1], 1)
