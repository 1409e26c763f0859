"""Heads for dense prediction, one file each: what they read of a backbone, and what is built on it."""

from visionpeft.heads.base import DenseHead
from visionpeft.heads.linear import LinearSegmentation
from visionpeft.heads.setr import SETR

__all__ = ["SETR", "DenseHead", "LinearSegmentation"]
