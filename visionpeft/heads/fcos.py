"""FCOS on a simple feature pyramid, or on that of a backbone in stages."""

from dataclasses import dataclass

from torch import nn
from torchvision.models import detection
from torchvision.models.detection.fcos import FCOSHead

from visionpeft.errors import ConfigurationError
from visionpeft.heads.base import Layers
from visionpeft.heads.detection import DetectionHead, ExactAnchors
from visionpeft.heads.pyramids import SimplePyramid, StagePyramid

GROUPS = 32  # of the group normalisation in torchvision's head


@dataclass(frozen=True)
class FCOS(DetectionHead):
    """A class, a box and a centreness at every place of five levels, without anchors: torchvision's FCOS.

    loss = (focal loss of the classes + GIoU loss of the boxes + binary cross-entropy of the centreness) / number of
    places that belong to an object; a score is the root of class times centreness. Strides are patch / finest times
    1, 2, 4, 8, 16: for patches of 16 pixels and finest = 2 the paper's 8 to 128, as for the last three stages of Swin
    and ConvNeXt. On the pyramid, with w = `width`, c = `convs` and K classes,
    2 c (9 w^2 + 3 w) + 9 w (K + 5) + K + 5 values. Classes begin at a probability of .01.

    Tian, Shen, Chen, He 2019, "FCOS: Fully Convolutional One-Stage Object Detection" (arXiv 1904.01355); the pyramid is
    ViTDet's (arXiv 2203.16527).

    Args:
        layers: see `DetectionHead`, as the other fields.
        width: a multiple of 32, at least 64.
        finest: places of the finest level in a row of a patch; see `DetectionHead`.
        convs: convolutions before the last, of classes and of boxes.
        score_threshold: torchvision's is .2, which the average precision would not see the rest of.
        nms_threshold: IoU.
        detections: of an image.
    """

    convolved = True
    layers: Layers | None = None
    width: int = 256
    finest: int = 2
    convs: int = 4
    score_threshold: float = 0.05
    nms_threshold: float = 0.6
    detections: int = 100

    def __post_init__(self):
        super().__post_init__()
        if self.width % GROUPS or self.width == GROUPS:  # whose groups of one channel have nothing left at one place
            raise ConfigurationError(f"FCOS: width must be a multiple of {GROUPS} from 64 on, not {self.width}")
        if self.convs < 0:
            raise ConfigurationError(f"FCOS: convs must not be negative, but is {self.convs}")

    def detector(self, pyramid: SimplePyramid | StagePyramid, num_classes: int, patch: int) -> nn.Module:
        """torchvision's FCOS on the pyramid."""
        strides = pyramid.strides(patch)
        anchors = ExactAnchors(strides, (1.0,), strides)
        # num_classes counts no background here: labels are indices of its outputs
        return detection.FCOS(
            pyramid,
            num_classes,
            anchor_generator=anchors,
            head=FCOSHead(self.width, 1, num_classes, self.convs),
            score_thresh=self.score_threshold,
            nms_thresh=self.nms_threshold,
            detections_per_img=self.detections,
        )
