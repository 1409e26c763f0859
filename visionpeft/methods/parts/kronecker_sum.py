"""Sums of Kronecker products with low-rank terms, which KAdaptation and Compacter share."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Rule(nn.Module):
    """The matrices A_i (terms, terms, terms) that all layers share, each Glorot-uniform, or N(0, std)."""

    def __init__(self, terms: int, std: float | None = None):
        super().__init__()
        self.A = nn.Parameter(torch.empty(terms, terms, terms))
        for matrix in self.A:
            nn.init.xavier_uniform_(matrix) if std is None else nn.init.normal_(matrix, std=std)


def kronecker_sum(A: torch.Tensor, u: torch.Tensor, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """sum_i (A_i kron u_i^T v_i) x without the products.

    Args:
        A: (terms, terms, terms).
        u: (terms, rank, out / terms).
        v: (terms, rank, in / terms).
        x: (..., in).

    Returns:
        (..., out).
    """
    terms, rank, _ = u.shape
    inner = F.linear(x.unflatten(-1, (terms, -1)), v.flatten(0, 1)).unflatten(-1, (terms, rank))
    mixed = torch.einsum("...jir,iaj->...air", inner, A.to(inner.dtype))
    return F.linear(mixed.flatten(-2), u.flatten(0, 1).t()).flatten(-2)


def kronecker_sum_weight(A: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The matrix sum_i A_i kron u_i^T v_i (out, in)."""
    return sum(torch.kron(each, left.t() @ right) for each, left, right in zip(A, u, v, strict=True))
