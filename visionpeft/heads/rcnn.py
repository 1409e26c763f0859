"""Faster R-CNN and Mask R-CNN on a simple feature pyramid, or on that of a backbone in stages."""

import math
from dataclasses import dataclass

from torch import nn
from torchvision.models import detection
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from visionpeft.errors import ConfigurationError
from visionpeft.heads.base import Layers
from visionpeft.heads.detection import DetectionHead, ExactAnchors
from visionpeft.heads.pyramids import LEVELS, SimplePyramid, StagePyramid

ANCHOR = 8  # strides long
RATIOS = (0.5, 1.0, 2.0)
BOX_PLACES, MASK_PLACES = 7, 14  # of a region, in a row


@dataclass(frozen=True)
class FasterRCNN(DetectionHead):
    """Regions are proposed on five levels, then classified and corrected one by one: torchvision's Faster R-CNN.

    loss = objectness and boxes of the proposals + classes and boxes of the regions. Strides are patch / finest times
    1, 2, 4, 8, 16: for patches of 16 pixels and finest = 4 the paper's 4 to 64, as for the four stages of Swin and
    ConvNeXt, with anchors of 32 to 512 pixels in three shapes. Regions are read from all levels but the last, by their
    size. Initialisations are torchvision's. For 91 outputs, K classes and the background, width = 256 and hidden = 1024
    there are 593,935 + 14,362,055 values on the pyramid.

    Ren, He, Girshick, Sun 2015, "Faster R-CNN" (arXiv 1506.01497), with Lin et al. 2016, "Feature Pyramid Networks"
    (arXiv 1612.03144); the pyramid is ViTDet's (arXiv 2203.16527).

    Args:
        layers: see `DetectionHead`, as the other fields.
        width: of the pyramid.
        finest: places of the finest level in a row of a patch; see `DetectionHead`.
        hidden: width of the two layers that see a region.
        score_threshold: of detections.
        nms_threshold: IoU.
        detections: of an image.
    """

    layers: Layers | None = None
    width: int = 256
    finest: int = 4
    hidden: int = 1024
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    detections: int = 100

    def __post_init__(self):
        super().__post_init__()
        if self.hidden < 1:
            raise ConfigurationError(f"{type(self).__name__}: hidden must be at least 1, not {self.hidden}")

    def detector(self, pyramid: SimplePyramid | StagePyramid, num_classes: int, patch: int) -> nn.Module:
        """torchvision's detector on the pyramid, whose label 0 is the background."""
        strides = pyramid.strides(patch)
        made = self._kind()(
            pyramid,
            rpn_anchor_generator=ExactAnchors([ANCHOR * stride for stride in strides], RATIOS, strides),
            box_roi_pool=_regions(pyramid, patch, BOX_PLACES),
            box_head=TwoMLPHead(self.width * BOX_PLACES**2, self.hidden),
            box_predictor=FastRCNNPredictor(self.hidden, num_classes + 1),
            box_score_thresh=self.score_threshold,
            box_nms_thresh=self.nms_threshold,
            box_detections_per_img=self.detections,
            **self._of_masks(pyramid, num_classes, patch),
        )
        made.first_label = 1
        return made

    def _kind(self) -> type[nn.Module]:
        return detection.FasterRCNN

    def _of_masks(self, pyramid: SimplePyramid | StagePyramid, num_classes: int, patch: int) -> dict:
        return {}


@dataclass(frozen=True)
class MaskRCNN(FasterRCNN):
    """Faster R-CNN with a mask of 28 x 28 places for each detection: torchvision's Mask R-CNN.

    To the loss comes the binary cross-entropy of the mask of the true class, in the regions of objects. The head of
    masks has four convolutions 3 x 3 of 256 channels and a transposed one: with 91 outputs 2,646,107 values more.

    He, Gkioxari, Dollár, Girshick 2017, "Mask R-CNN" (arXiv 1703.06870); the pyramid is ViTDet's (arXiv 2203.16527).

    Args:
        layers: as in `FasterRCNN`, as the other fields.
        width: of the pyramid.
        finest: places of the finest level in a row of a patch; see `DetectionHead`.
        hidden: width of the two layers that see a region.
        mask_width: channels of the head of masks.
        score_threshold: of detections.
        nms_threshold: IoU.
        detections: of an image.
    """

    masks = True
    mask_width: int = 256

    def __post_init__(self):
        super().__post_init__()
        if self.mask_width < 1:
            raise ConfigurationError(f"MaskRCNN: mask_width must be at least 1, not {self.mask_width}")

    def _kind(self) -> type[nn.Module]:
        return detection.MaskRCNN

    def _of_masks(self, pyramid: SimplePyramid | StagePyramid, num_classes: int, patch: int) -> dict:
        return {
            "mask_roi_pool": _regions(pyramid, patch, MASK_PLACES),
            "mask_head": MaskRCNNHeads(self.width, (self.mask_width,) * 4, 1),
            "mask_predictor": MaskRCNNPredictor(self.mask_width, self.mask_width, num_classes + 1),
        }


def _regions(pyramid: SimplePyramid | StagePyramid, patch: int, places: int) -> MultiScaleRoIAlign:
    """The levels but the last, of which a region of 14 patches in a row is read from that of the patches.

    torchvision would round the scales to powers of two, and keep those of the first image it sees.
    """
    # findings/torchvision_detectors_round_strides.sh
    names = [str(level) for level in range(LEVELS - 1)]
    align = MultiScaleRoIAlign(names, places, sampling_ratio=2)
    align.scales = [1 / stride for stride in pyramid.strides(patch)[:-1]]
    levels = [round(4 - math.log2(scale)) for scale in pyramid.scales[:-1]]  # 4 is that of the patches, as in the paper
    align.map_levels = initLevelMapper(levels[0], levels[-1], canonical_scale=14 * patch, canonical_level=4)
    return align
