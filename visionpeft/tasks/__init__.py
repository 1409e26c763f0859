"""LightningModules: what is trained, with which loss and optimiser, and how it is measured."""

from visionpeft.tasks.classification import ImageClassification
from visionpeft.tasks.image_task import ImageTask
from visionpeft.tasks.prompt_learning import PromptLearning
from visionpeft.tasks.video_classification import VideoClassification

__all__ = ["ImageClassification", "ImageTask", "PromptLearning", "VideoClassification"]
