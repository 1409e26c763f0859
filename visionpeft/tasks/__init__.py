"""LightningModules: what is trained, with which loss and optimiser, and how it is measured."""

from visionpeft.tasks.classification import ImageClassification
from visionpeft.tasks.image_task import ImageTask

__all__ = ["ImageClassification", "ImageTask"]
