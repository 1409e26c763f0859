"""Models of clips, made from models of images."""

from visionpeft.video.classifier import VideoClassifier

__all__ = ["VideoClassifier"]
