"""CLIP with learned prompts and few-shot adapters: the text tower, and one file for each learner."""

from visionpeft.clip.learner import Learner
from visionpeft.clip.learners.c_tpt import CTPT
from visionpeft.clip.learners.clap import CLAP
from visionpeft.clip.learners.clip_adapter import CLIPAdapter
from visionpeft.clip.learners.clip_linear_probe import CLIPLinearProbe
from visionpeft.clip.learners.clip_lora import CLIPLoRA
from visionpeft.clip.learners.cocoop import CoCoOp
from visionpeft.clip.learners.coop import CoOp
from visionpeft.clip.learners.dapt import DAPT
from visionpeft.clip.learners.dept import DePT
from visionpeft.clip.learners.diff_tpt import DiffTPT
from visionpeft.clip.learners.ivlp import IVLP
from visionpeft.clip.learners.kgcoop import KgCoOp
from visionpeft.clip.learners.lp_plus_plus import LPPlusPlus
from visionpeft.clip.learners.maple import MaPLe
from visionpeft.clip.learners.mta import MTA
from visionpeft.clip.learners.plot import PLOT
from visionpeft.clip.learners.plot_plus_plus import PLOTPlusPlus
from visionpeft.clip.learners.proda import ProDA
from visionpeft.clip.learners.prograd import ProGrad
from visionpeft.clip.learners.prompt_align import PromptAlign
from visionpeft.clip.learners.promptsrc import PromptSRC
from visionpeft.clip.learners.provp import ProVP
from visionpeft.clip.learners.rpo import RPO
from visionpeft.clip.learners.task_res import TaskRes
from visionpeft.clip.learners.tcp import TCP
from visionpeft.clip.learners.tda import TDA
from visionpeft.clip.learners.tip_adapter import TipAdapter
from visionpeft.clip.learners.tps import TPS
from visionpeft.clip.learners.tpt import TPT
from visionpeft.clip.learners.tuned_clip import TunedCLIP
from visionpeft.clip.learners.two_stage_few_shot import TwoStageFewShot
from visionpeft.clip.learners.zero import ZERO
from visionpeft.clip.learners.zero_shot import ZeroShot

__all__ = [
    "CLAP",
    "CTPT",
    "DAPT",
    "IVLP",
    "MTA",
    "PLOT",
    "RPO",
    "TCP",
    "TDA",
    "TPS",
    "TPT",
    "ZERO",
    "CLIPAdapter",
    "CLIPLinearProbe",
    "CLIPLoRA",
    "CoCoOp",
    "CoOp",
    "DePT",
    "DiffTPT",
    "KgCoOp",
    "LPPlusPlus",
    "Learner",
    "MaPLe",
    "PLOTPlusPlus",
    "ProDA",
    "ProGrad",
    "ProVP",
    "PromptAlign",
    "PromptSRC",
    "TaskRes",
    "TipAdapter",
    "TunedCLIP",
    "TwoStageFewShot",
    "ZeroShot",
]
