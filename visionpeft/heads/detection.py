"""What the heads for object detection have in common: a pyramid of one map, and torchvision's detectors on it."""

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from visionpeft.errors import ConfigurationError
from visionpeft.heads.base import DenseHead, DenseModule, Layers

LEVELS = 5

Target = dict[str, torch.Tensor]


class DetectionHead(DenseHead):
    """Base of heads that find objects: frozen dataclasses, given one map of a backbone and no image.

    Every such head has the fields below, and what it builds is on a `SimplePyramid` of five levels.

    Args:
        layers: see `DenseHead`; one.
        width: channels of the pyramid.
        finest: places of the finest level in a row of a patch, 4, 2 or 1; each of the other levels has half as many.
        score_threshold: detections of a lower score are left out.
        nms_threshold: of two detections of a class whose boxes have a larger IoU, the one of the lower score goes.
        detections: how many are kept of an image, at most.
    """

    number_of_maps = 1
    masks = False  # whether each object's mask is found as well
    layers: Layers
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

    def build(self, channels: int, maps: int, num_classes: int, patch: int) -> "DetectionModule":
        """The head for a map of so many channels with a place for `patch` x `patch` pixels, newly initialised."""
        detector = self.detector(SimplePyramid(channels, self.width, self.finest), num_classes, patch)
        detector.transform = _AsGiven()
        return DetectionModule(detector)

    @abstractmethod
    def detector(self, pyramid: "SimplePyramid", num_classes: int, patch: int) -> nn.Module:
        """A detector of torchvision's on the pyramid of patches of so many pixels."""


class DetectionModule(DenseModule):
    """A built head: a map (batch, 1, channels, rows, columns) -> losses, or what is found in each image.

    Args:
        detector: torchvision's, whose first label is its `first_label`, 0 if it has none.
    """

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(
        self, maps: torch.Tensor, size: Sequence[int], targets: list[Target] | None = None
    ) -> dict[str, torch.Tensor] | list[Target]:
        """Losses by name where there are targets, else detections; both do not depend on the mode of the module.

        Args:
            maps: (batch, 1, channels, rows, columns).
            size: height and width of the images in pixels, of which the map may show more than there is.
            targets: of each image "boxes" float (n, 4) as x0, y0, x1, y1 in pixels and "labels" int64 (n,), for masks
                "masks" uint8 (n, height, width) as well.

        Returns:
            The losses, each (); or of each image "boxes" (m, 4), "scores" (m,), "labels" (m,), best first, and with
            masks "masks" float (m, 1, 28, 28), the probability of each place in the box.
        """
        first = getattr(self.detector, "first_label", 0)
        if targets is not None:
            targets = [target | {"labels": target["labels"] + first} for target in targets]
        # torchvision's modules take their mode for what is asked of them
        self.detector.train(targets is not None)
        found = self.detector(_Maps(maps[:, 0], size), targets)
        if targets is not None:
            return found
        return [image | {"labels": image["labels"] - first} for image in found]


class SimplePyramid(nn.Module):
    """Five maps of one: the simple feature pyramid of ViTDet.

    With D `channels` and w `width`, a level of 4 x 4 places for each of the map is conv_transpose 2 x 2 D -> D/2, layer
    norm over channels, GELU, conv_transpose 2 x 2 D/2 -> D/4; of 2 x 2 conv_transpose 2 x 2 D -> D/2; of 1 the map
    itself; of 1/2 its maxima over 2 x 2. Each goes through conv 1 x 1 -> w, layer norm, conv 3 x 3 w -> w, layer norm,
    both without bias. Coarser levels are every second place of the one before. Initialisations are PyTorch's. From 4
    x 4 places on there are 5,560,000 values for D = 768, w = 256.

    Li, Mao, Girshick, He 2022, "Exploring Plain Vision Transformer Backbones for Object Detection" (arXiv 2203.16527).

    Args:
        channels: D.
        width: w.
        finest: places in a row of the finest level for each of the map's: 4, 2 or 1.
    """

    def __init__(self, channels: int, width: int, finest: int):
        super().__init__()
        self.out_channels = width  # which torchvision asks for
        half, quarter = channels // 2, channels // 4
        steps = {
            4: nn.Sequential(
                *(nn.ConvTranspose2d(channels, half, 2, 2), LayerNorm2d(half), nn.GELU()),
                nn.ConvTranspose2d(half, quarter, 2, 2),
            ),
            2: nn.ConvTranspose2d(channels, half, 2, 2),
            1: nn.Identity(),
            0.5: nn.MaxPool2d(2, 2, ceil_mode=True),
        }
        given = {4: quarter, 2: half, 1: channels, 0.5: channels}
        made = [scale for scale in steps if scale <= finest]
        self.scales = [finest / 2**level for level in range(LEVELS)]  # places in a row for one of the map
        self.resample = nn.ModuleList(steps[scale] for scale in made)
        self.levels = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(given[scale], width, 1, bias=False), LayerNorm2d(width)),
                *(nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width)),
            )
            for scale in made
        )

    def forward(self, maps: torch.Tensor) -> "OrderedDict[str, torch.Tensor]":
        """(batch, channels, rows, columns) -> five maps (batch, width, ...), the finest first, named "0" to "4"."""
        levels = [level(step(maps)) for step, level in zip(self.resample, self.levels, strict=True)]
        while len(levels) < LEVELS:
            levels.append(F.max_pool2d(levels[-1], 1, 2))
        return OrderedDict((str(number), level) for number, level in enumerate(levels))

    def strides(self, patch: int) -> list[float]:
        """Pixels from one place of each level to the next."""
        return [patch / scale for scale in self.scales]


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

    def __init__(self, maps: torch.Tensor, size: Sequence[int]):
        super().__init__(maps)
        self.maps, self.size = maps, tuple(size)


class _AsGiven(nn.Module):
    """In the place of torchvision's transform, which would resize and normalise: nothing is done."""

    def forward(self, images: _Maps, targets: list[Target] | None = None) -> tuple[ImageList, list[Target] | None]:
        return ImageList(images.maps, [images.size] * len(images)), targets

    def postprocess(self, found: list[Target], image_shapes, original_image_sizes) -> list[Target]:
        return found
