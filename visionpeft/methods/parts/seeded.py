"""What follows from a seed bit by bit on every machine: numbers of NumPy's PCG64, whose stream is guaranteed."""

import functools

import numpy as np
import torch


def raw_numbers(count: int, *seed: int) -> np.ndarray:
    """`count` whole numbers of 64 random bits."""
    return np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)


@functools.lru_cache(maxsize=64)
def places(rows: int, columns: int, count: int, seed: int) -> torch.Tensor:
    """Flat indices (count,) of as many different entries of a matrix, ascending."""
    order = raw_numbers(rows * columns, seed, rows, columns).argsort(kind="stable")
    return torch.from_numpy(np.sort(order[:count]).astype(np.int64))


def mask(rows: int, columns: int, density: float, *seed: int) -> torch.Tensor:
    """A matrix of ones and zeros (rows, columns), each entry a one with this probability."""
    unit = (raw_numbers(rows * columns, *seed, rows, columns) >> np.uint64(40)).astype(np.float64) / 2**24
    return torch.from_numpy((unit < density).astype(np.float32)).view(rows, columns)
