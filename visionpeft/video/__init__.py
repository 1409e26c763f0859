"""Models of clips, made from models of images."""

from visionpeft.video.classifier import VideoClassifier
from visionpeft.video.views import over_views

__all__ = ["VideoClassifier", "over_views"]
