"""LightningModules: what is trained, with which loss and optimiser, and how it is measured."""

from visionpeft.tasks.image_classification import ImageClassification
from visionpeft.tasks.object_detection import ObjectDetection
from visionpeft.tasks.open_vocabulary_segmentation import OpenVocabularySegmentation
from visionpeft.tasks.prompt_learning import PromptLearning
from visionpeft.tasks.semantic_segmentation import SemanticSegmentation
from visionpeft.tasks.task import ImageTask
from visionpeft.tasks.video_classification import VideoClassification

__all__ = [
    "ImageClassification",
    "ImageTask",
    "ObjectDetection",
    "OpenVocabularySegmentation",
    "PromptLearning",
    "SemanticSegmentation",
    "VideoClassification",
]
