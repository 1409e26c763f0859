"""Parameter-efficient fine-tuning of Vision Transformers and CLIP."""

from visionpeft.attach import activate, attach, detach, disable, route, trainable_parameters, use
from visionpeft.backbones import describe
from visionpeft.backbones.create import create_backbone
from visionpeft.clip import (
    IVLP,
    TPT,
    CLIPAdapter,
    CLIPLinearProbe,
    CLIPLoRA,
    CoCoOp,
    CoOp,
    KgCoOp,
    Learner,
    MaPLe,
    ProGrad,
    PromptSRC,
    TipAdapter,
    ZeroShot,
)
from visionpeft.clip.create import create_clip
from visionpeft.clip.description import read_learner
from visionpeft.clip.storage import load_learner, save_learner
from visionpeft.errors import ConfigurationError, DataError, StorageError, UnsupportedError, UserError
from visionpeft.merge import merge, unmerge
from visionpeft.methods import (
    AIM,
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
    STAdapter,
)
from visionpeft.storage import load, read_metadata, save
from visionpeft.summary import summary
from visionpeft.video import VideoClassifier

__all__ = [
    "AIM",
    "IVLP",
    "SSF",
    "TPT",
    "VPT",
    "AdaptFormer",
    "Adapter",
    "BitFit",
    "CLIPAdapter",
    "CLIPLinearProbe",
    "CLIPLoRA",
    "CoCoOp",
    "CoOp",
    "ConfigurationError",
    "DataError",
    "FullFineTuning",
    "KgCoOp",
    "LastBlocks",
    "Learner",
    "LinearProbe",
    "LoRA",
    "MaPLe",
    "Method",
    "PrefixTuning",
    "ProGrad",
    "PromptSRC",
    "STAdapter",
    "StorageError",
    "TipAdapter",
    "UnsupportedError",
    "UserError",
    "VideoClassifier",
    "ZeroShot",
    "activate",
    "attach",
    "create_backbone",
    "create_clip",
    "describe",
    "detach",
    "disable",
    "load",
    "load_learner",
    "merge",
    "read_learner",
    "read_metadata",
    "route",
    "save",
    "save_learner",
    "summary",
    "trainable_parameters",
    "unmerge",
    "use",
]
