"""Start values of vision transformers that shorten the training."""

import torch
import torch.nn.functional as F
from torch import Tensor


def whitening(images: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Weight (outputs, 3, patch, patch) and bias of a patch embedding that whitens the patches of ``images``.

    It stays as it is during training, as random projections do in https://arxiv.org/abs/2104.02057.
    """
    patches = F.unfold(images, patch, stride=patch).mT.reshape(-1, 3 * patch**2)
    variances, directions = torch.linalg.eigh(patches.T.cov())
    weight = 0.5 * (directions / (variances + 0.1 * variances.mean()).sqrt()).T
    return weight.view(-1, 3, patch, patch), -weight @ patches.mean(0)


def waves(side: int, width: int) -> Tensor:
    """Sines and cosines of the row and the column of each of side * side positions, (positions, width)."""
    frequencies = 10000 ** -torch.linspace(0, 1, width // 4)
    angles = torch.outer(torch.arange(side).float(), frequencies)
    both = 0.5 * torch.cat([angles.sin(), angles.cos()], 1)  # (side, width / 2)
    rows, columns = both[:, None].expand(-1, side, -1), both[None].expand(side, -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)


@torch.no_grad()
def start_attention(qkv: Tensor, projection: Tensor, heads: int) -> None:
    """Queries and keys begin near the identity, values and their projection near its negative.

    Source: Trockman and Kolter, Mimetic Initialization of Self-Attention Layers, https://arxiv.org/abs/2305.09828.

    Args:
        qkv: weight (3 * width, width), filled in place.
        projection: weight (width, width), filled in place.
        heads: number of attention heads.
    """
    width, size = len(projection), len(projection) // heads
    identity = torch.eye(width)
    query, key, value = qkv.split(width)
    for head in range(heads):
        left, scales, right = torch.linalg.svd(0.7 * torch.randn(width, width) / width**0.5 + 0.7 * identity)
        part = slice(head * size, head * size + size)
        query[part] = (left[:, :size] * scales[:size].sqrt()).T
        key[part] = right[:size] * scales[:size, None].sqrt()
    left, scales, right = torch.linalg.svd(0.4 * torch.randn(width, width) / width**0.5 - 0.4 * identity)
    projection.copy_(left * scales.sqrt())
    value.copy_(scales.sqrt()[:, None] * right)
