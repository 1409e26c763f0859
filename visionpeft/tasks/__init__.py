"""LightningModules: what is trained, with which loss and optimiser, and how it is measured."""

from visionpeft.tasks.classification import ImageClassification
from visionpeft.tasks.image_task import ImageTask
from visionpeft.tasks.prompt_learning import PromptLearning

__all__ = ["ImageClassification", "ImageTask", "PromptLearning"]
