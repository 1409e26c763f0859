"""Heads for dense prediction, one file each: what they read of a backbone, and what is built on it."""

from visionpeft.heads.base import DenseHead
from visionpeft.heads.detection import DetectionHead
from visionpeft.heads.dpt import DPT
from visionpeft.heads.eomt import EoMT
from visionpeft.heads.fcos import FCOS
from visionpeft.heads.linear import LinearSegmentation
from visionpeft.heads.pmt import PMT
from visionpeft.heads.rcnn import FasterRCNN, MaskRCNN
from visionpeft.heads.segmenter import Segmenter
from visionpeft.heads.setr import SETR
from visionpeft.heads.upernet import UPerNet

__all__ = [
    "DPT",
    "FCOS",
    "PMT",
    "SETR",
    "DenseHead",
    "DetectionHead",
    "EoMT",
    "FasterRCNN",
    "LinearSegmentation",
    "MaskRCNN",
    "Segmenter",
    "UPerNet",
]
