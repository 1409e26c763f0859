"""CLIP with learned prompts and few-shot adapters: the text tower, and one file for each learner."""

from visionpeft.clip.clip_adapter import CLIPAdapter
from visionpeft.clip.clip_linear_probe import CLIPLinearProbe
from visionpeft.clip.clip_lora import CLIPLoRA
from visionpeft.clip.cocoop import CoCoOp
from visionpeft.clip.coop import CoOp
from visionpeft.clip.ivlp import IVLP
from visionpeft.clip.kgcoop import KgCoOp
from visionpeft.clip.learner import Learner
from visionpeft.clip.maple import MaPLe
from visionpeft.clip.prograd import ProGrad
from visionpeft.clip.promptsrc import PromptSRC
from visionpeft.clip.tip_adapter import TipAdapter
from visionpeft.clip.tpt import TPT
from visionpeft.clip.zero_shot import ZeroShot

__all__ = [
    "IVLP",
    "TPT",
    "CLIPAdapter",
    "CLIPLinearProbe",
    "CLIPLoRA",
    "CoCoOp",
    "CoOp",
    "KgCoOp",
    "Learner",
    "MaPLe",
    "ProGrad",
    "PromptSRC",
    "TipAdapter",
    "ZeroShot",
]
