"""Where methods act: one file for each block family, found by the class of the module."""

from visionpeft.backbones import timm_beit, timm_convnext, timm_eva, timm_layers, timm_vit  # noqa: F401  (register families)
from visionpeft.backbones.dispatch import describe

__all__ = ["describe"]
