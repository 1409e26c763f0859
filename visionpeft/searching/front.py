"""Pareto fronts: what nothing else is better than."""

from collections.abc import Sequence

import numpy as np


def on_front(points: Sequence[Sequence[float]]) -> list[bool]:
    """Whether no other point is as small in every coordinate and smaller in one; equal points are on it together.

    Args:
        points: coordinates to be made small, such as (-accuracy, parameters).
    """
    values = np.asarray(points, dtype=float)
    return [not bool(((values <= own).all(axis=1) & (values < own).any(axis=1)).any()) for own in values]
