"""Where methods act: one file for each block family, found by the class of the module."""

from visionpeft.backbones import (  # noqa: F401  (register families)
    timm_beit,
    timm_convnext,
    timm_eva,
    timm_hiera,
    timm_hiera_det,
    timm_layers,
    timm_naflex,
    timm_parallel,
    timm_qwen,
    timm_relpos,
    timm_sam,
    timm_swin,
    timm_swin_v2,
    timm_vit,
)
from visionpeft.backbones.whole_model import describe

__all__ = ["describe"]
