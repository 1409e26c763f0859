"""What acts: one file for each method."""

from visionpeft.methods.adapter import Adapter
from visionpeft.methods.adaptformer import AdaptFormer
from visionpeft.methods.aim import AIM
from visionpeft.methods.base import Method
from visionpeft.methods.bitfit import BitFit
from visionpeft.methods.lora import LoRA
from visionpeft.methods.prefix_tuning import PrefixTuning
from visionpeft.methods.selective import FullFineTuning, LastBlocks, LinearProbe
from visionpeft.methods.ssf import SSF
from visionpeft.methods.st_adapter import STAdapter
from visionpeft.methods.vpt import VPT

__all__ = [
    "AIM",
    "SSF",
    "VPT",
    "AdaptFormer",
    "Adapter",
    "BitFit",
    "FullFineTuning",
    "LastBlocks",
    "LinearProbe",
    "LoRA",
    "Method",
    "PrefixTuning",
    "STAdapter",
]
