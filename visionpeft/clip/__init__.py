"""CLIP with learned prompts and few-shot adapters: the text tower, and one file for each learner."""

from visionpeft.clip.coop import CoOp
from visionpeft.clip.learner import Learner
from visionpeft.clip.zero_shot import ZeroShot

__all__ = ["CoOp", "Learner", "ZeroShot"]
