"""What the heads for object detection have in common: torchvision's detectors on a pyramid of maps."""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.heads.base import DenseHead, DenseModule, Layers
from visionpeft.heads.pyramids import SimplePyramid, StagePyramid

STAGES = {4: 4, 2: 3, 1: 2}  # how many of the last are read, by `finest`

Target = dict[str, torch.Tensor]


class DetectionHead(DenseHead):
    """Base of heads that find objects: frozen dataclasses, given maps of a backbone and no image.

    Every such head has the fields below, and what it builds is on a pyramid of five levels: on one map of a plain
    backbone a `SimplePyramid`, on the last stages of a backbone in stages a `StagePyramid`.

    Args:
        layers: see `DenseHead`; one, the last block when absent. Of a backbone in stages it has to be absent: the last
            four stages are read, three with `finest=2` and two with `finest=1`.
        width: channels of the pyramid.
        finest: places of the finest level in a row of a patch, or of a place of the stage before the last, 4, 2 or 1;
            each of the other levels has half as many.
        score_threshold: detections of a lower score are left out.
        nms_threshold: of two detections of a class whose boxes have a larger IoU, the one of the lower score goes.
        detections: how many are kept of an image, at most.
    """

    number_of_maps = 1
    masks = False  # whether each object's mask is found as well
    convolved = False  # whether levels coarser than the last stage are convolutions of it, and not its places
    layers: Layers | None
    width: int
    finest: int
    score_threshold: float
    nms_threshold: float
    detections: int

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        if self.finest not in (1, 2, 4):
            raise ConfigurationError(f"{name}: finest must be 1, 2 or 4, not {self.finest}")
        for field in ("width", "detections"):
            if getattr(self, field) < 1:
                raise ConfigurationError(f"{name}: {field} must be at least 1, not {getattr(self, field)}")
        for field in ("score_threshold", "nms_threshold"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigurationError(f"{name}: {field} must be from 0 to 1, not {getattr(self, field)}")

    def blocks(self, depth: int, called: str = "blocks") -> tuple[int, ...]:
        """As `DenseHead.blocks`."""
        return super().blocks(depth, called) if self.layers is not None else (depth - 1,)

    def stages(self, number: int) -> tuple[int, ...]:
        """Numbers of the stages that are read, of a backbone in so many.

        Raises:
            ConfigurationError: it has fewer stages, or `layers` says something else.
        """
        name, read = type(self).__name__, STAGES[self.finest]
        if self.layers is not None:
            raise ConfigurationError(
                f"{name} reads the last stages of a backbone in stages, four, three or two by its field finest; leave "
                "layers out"
            )
        if read > number:
            raise ConfigurationError(
                f"{name} reads {read} stages with finest={self.finest}, of a backbone that has {number}"
            )
        return tuple(range(number - read, number))

    def build(self, channels: int, maps: int, num_classes: int, patch: int) -> "DetectionModule":
        """The head for a map of so many channels with a place for `patch` x `patch` pixels, newly initialised."""
        return self._module(SimplePyramid(channels, self.width, self.finest), num_classes, patch)

    def build_on_stages(self, channels: Sequence[int], num_classes: int, strides: Sequence[int]) -> "DetectionModule":
        """The head for maps of stages with these channels and pixels from place to place, newly initialised.

        Raises:
            UnsupportedError: a stage does not have twice the stride of the one before.
        """
        if any(coarse != 2 * fine for fine, coarse in pairwise(strides)):
            raise UnsupportedError(
                f"{type(self).__name__} reads stages of which each has twice the stride of the one before, not of "
                f"{', '.join(map(str, strides))} pixels"
            )
        pyramid = StagePyramid(channels, self.width, self.finest, self.convolved)
        return self._module(pyramid, num_classes, strides[-2])

    def _module(self, pyramid: SimplePyramid | StagePyramid, num_classes: int, patch: int) -> "DetectionModule":
        detector = self.detector(pyramid, num_classes, patch)
        detector.transform = _AsGiven()
        return DetectionModule(detector)

    @abstractmethod
    def detector(self, pyramid: SimplePyramid | StagePyramid, num_classes: int, patch: int) -> nn.Module:
        """A detector of torchvision's on the pyramid of patches, or of places, of so many pixels."""


class DetectionModule(DenseModule):
    """A built head: a map (batch, 1, channels, rows, columns), or maps of stages -> losses, or what is found.

    Args:
        detector: torchvision's, whose first label is its `first_label`, 0 if it has none.
    """

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(
        self, maps: torch.Tensor | list[torch.Tensor], size: Sequence[int], targets: list[Target] | None = None
    ) -> dict[str, torch.Tensor] | list[Target]:
        """Losses by name where there are targets, else detections; both do not depend on the mode of the module.

        Args:
            maps: (batch, 1, channels, rows, columns), or of each stage (batch, channels, rows, columns).
            size: height and width of the images in pixels, of which the map may show more than there is.
            targets: of each image "boxes" float (n, 4) as x0, y0, x1, y1 in pixels and "labels" int64 (n,), for masks
                "masks" uint8 (n, height, width) as well.

        Returns:
            The losses, each (); or of each image "boxes" (m, 4), "scores" (m,), "labels" (m,), best first, and with
            masks "masks" float (m, 1, 28, 28), the probability of each place in the box.

        Raises:
            ConfigurationError: the head is in half precision, in which boxes are off by pixels, and torchvision finds
                no overlaps of them.
        """
        if (dtype := next(self.parameters()).dtype) in (torch.bfloat16, torch.float16):
            raise ConfigurationError(
                f"a head that finds objects computes their boxes in single precision, not in {dtype}; put "
                "model.backbone alone into half precision (model.head.float() and model.peft.float() bring the rest "
                "back)"
            )
        first = getattr(self.detector, "first_label", 0)
        if targets is not None:
            targets = [target | {"labels": target["labels"] + first} for target in targets]
        # torchvision's modules take their mode for what is asked of them
        self.detector.train(targets is not None)
        found = self.detector(_Maps(maps if isinstance(maps, list) else maps[:, 0], size), targets)
        if targets is not None:
            return found
        return [image | {"labels": image["labels"] - first} for image in found]


class ExactAnchors(AnchorGenerator):
    """torchvision's anchors, `strides` pixels apart, which it would round down: 3 for 3.5 where patches have 14 pixels.

    Args:
        sizes: of the anchors of each level.
        ratios: height by width.
        strides: of each level.
    """

    def __init__(self, sizes: Sequence[float], ratios: Sequence[float], strides: Sequence[float]):
        super().__init__(tuple((size,) for size in sizes), (tuple(ratios),) * len(sizes))
        self.strides = list(strides)

    def forward(self, image_list: ImageList, feature_maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Anchors (n, 4) of all levels together, for each image."""
        # findings/torchvision_detectors_round_strides.sh
        like = feature_maps[0]
        self.set_cell_anchors(torch.float32, like.device)
        grids = [level.shape[-2:] for level in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [[stride, stride] for stride in self.strides]))
        return [anchors] * len(image_list.image_sizes)


class _Maps(list):
    """Maps in the place of the images that torchvision's detectors take, and the size of those."""

    def __init__(self, maps: torch.Tensor | list[torch.Tensor], size: Sequence[int]):
        super().__init__(maps[0] if isinstance(maps, list) else maps)  # one for each image, whose shape is asked for
        self.maps, self.size = maps, tuple(size)


class _AsGiven(nn.Module):
    """In the place of torchvision's transform, which would resize and normalise: nothing is done."""

    def forward(self, images: _Maps, targets: list[Target] | None = None) -> tuple[ImageList, list[Target] | None]:
        return ImageList(images.maps, [images.size] * len(images)), targets

    def postprocess(self, found: list[Target], image_shapes, original_image_sizes) -> list[Target]:
        return found
