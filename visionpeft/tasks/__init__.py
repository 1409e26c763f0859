"""LightningModules: what is trained, with which loss and optimiser, and how it is measured."""

from visionpeft.tasks.classification import ImageClassification

__all__ = ["ImageClassification"]
