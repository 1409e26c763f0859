"""Parameter-efficient fine-tuning of Vision Transformers and CLIP."""

from visionpeft.attach import activate, attach, detach, disable, route, trainable_parameters, use
from visionpeft.backbones import describe
from visionpeft.backbones.create import create_backbone
from visionpeft.errors import ConfigurationError, DataError, StorageError, UnsupportedError, UserError
from visionpeft.merge import merge, unmerge
from visionpeft.methods import (
    SSF,
    VPT,
    Adapter,
    AdaptFormer,
    BitFit,
    FullFineTuning,
    LastBlocks,
    LinearProbe,
    LoRA,
    Method,
    PrefixTuning,
)
from visionpeft.storage import load, read_metadata, save
from visionpeft.summary import summary

__all__ = [
    "SSF",
    "VPT",
    "AdaptFormer",
    "Adapter",
    "BitFit",
    "ConfigurationError",
    "DataError",
    "FullFineTuning",
    "LastBlocks",
    "LinearProbe",
    "LoRA",
    "Method",
    "PrefixTuning",
    "StorageError",
    "UnsupportedError",
    "UserError",
    "activate",
    "attach",
    "create_backbone",
    "describe",
    "detach",
    "disable",
    "load",
    "merge",
    "read_metadata",
    "route",
    "save",
    "summary",
    "trainable_parameters",
    "unmerge",
    "use",
]
