"""A backbone with a head that finds objects: boxes, and masks if the head has them."""

from collections.abc import Sequence

import torch
from torch import nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from visionpeft.adapters.attach import attach
from visionpeft.backbones.dispatch import describe_model
from visionpeft.backbones.tower import Backbone
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.heads import FCOS, DenseHead, DetectionHead
from visionpeft.heads.detection import Target
from visionpeft.methods.parts.base import Method
from visionpeft.methods.parts.field_types import as_python
from visionpeft.models.create import create_dense_backbone
from visionpeft.models.feature_maps import feature_maps
from visionpeft.models.image_tower import check_read, describe_around, filled_up, image_tower, what_is_read
from visionpeft.sites.stand_ins import acting_head

DEFAULT = FCOS()
READER = "an ObjectDetector"


class ObjectDetector(nn.Module):
    """Boxes of the objects in an image, with class and score, and masks where the head has them.

    Backbone, head and method do not know each other, as in a `DensePredictor`: the head reads one map of the backbone,
    or those of its last stages, by `feature_maps`, and belongs to the adapter, with which it is saved. Images come
    normalised as the backbone wants them, and are neither resized nor normalised again. Those whose sides are no
    multiples of the patch's, or of the stride of the last stage, are filled with zeros on the right and at the bottom;
    no box reaches there.

    Args:
        backbone: as for `DensePredictor`.
        head: what finds objects in the map.
        classes: names of the classes, the background not among them, or their number; one will do.
        method: a method or several, attached as the adapter "default"; None to attach later.

    Raises:
        UnsupportedError: the backbone is no supported model of images, or the method does not fit it.
        ConfigurationError: no class, a head of another kind, or patches that are no squares.
    """

    def __init__(
        self,
        backbone: nn.Module | str,
        head: DetectionHead = DEFAULT,
        classes: Sequence[str] | int = 1,
        method: Method | Sequence[Method] | None = None,
    ):
        super().__init__()
        classes = as_python(classes)
        number = classes if isinstance(classes, int) else len(classes)
        if isinstance(classes, bool | str) or number < 1:
            raise ConfigurationError(f"classes must be a list of names, or their number, not {classes!r}")
        if not isinstance(head, DetectionHead):
            raise ConfigurationError(f"head must be a head that finds objects, such as FCOS(), not {head!r}")
        backbone = create_dense_backbone(backbone) if isinstance(backbone, str) else backbone
        tower = image_tower(backbone, READER)
        if len(set(tower.patch_size)) > 1:
            raise UnsupportedError(f"patches of {tower.patch_size} pixels are no squares, which heads take them for")
        self.backbone = backbone
        self.blocks, channels, strides = what_is_read(head, tower, READER)
        self.in_stages, self.depth = bool(tower.stages), len(tower.stages) or tower.depth
        self.patch = tower.strides[-1] if tower.stages else tower.patch_size[0]
        like = next(backbone.parameters())
        geometry = {"strides": strides} if tower.stages else {"patch": self.patch}
        made = head.make(channels, len(self.blocks), number, **geometry)
        self.head = made.to(like.device, like.dtype)
        if hasattr(backbone, "backbone_source"):
            self.backbone_source = backbone.backbone_source
        self.train(backbone.training)
        if method is not None:
            attach(self, method)

    @property
    def num_classes(self) -> int:
        """How many classes the head tells apart, that of the adapter where one acts."""
        return acting_head(self.head).layout["arguments"]["num_classes"]

    def check_head(self, head: DenseHead, module: nn.Module) -> None:
        """Refuse the head of a saved adapter that this model cannot give what it reads.

        Raises:
            StorageError: it reads other blocks or stages.
        """
        check_read(head, self.blocks, self.depth, self.in_stages, READER)

    def maps(self, images: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """What the head reads of images (batch, 3, height, width): see `DetectionModule`."""
        return feature_maps(self.backbone, filled_up(images, (self.patch, self.patch), READER), self.blocks)

    def losses(self, images: torch.Tensor, targets: list[Target]) -> dict[str, torch.Tensor]:
        """The losses of the head by name, each (), which add up to that of the batch.

        Args:
            images: (batch, 3, height, width).
            targets: of each image "boxes" float (n, 4) as x0, y0, x1, y1 in pixels, with x0 < x1 and y0 < y1, "labels"
                int64 (n,) from 0, and for a head with masks "masks" uint8 (n, height, width).
        """
        return self.head(self.maps(images), images.shape[-2:], targets)

    def forward(self, images: torch.Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> list[Target]:
        """What is found in images (batch, 3, height, width), best first.

        Args:
            images: the images.
            sizes: height and width of each image before it was resized, in whose pixels the answer is given.

        Returns:
            Of each image "boxes" float (n, 4) as x0, y0, x1, y1, "scores" (n,) from 0 to 1, "labels" int64 (n,) from 0,
            and of a head with masks "masks" bool (n, height, width), where the probability is more than a half.
        """
        own = tuple(images.shape[-2:])
        found = self.head(self.maps(images), own)
        return [at_size(image, own, size) for image, size in zip(found, sizes or [own] * len(found), strict=True)]

    def measure(
        self, images: torch.Tensor, targets: list[Target], sizes: Sequence[tuple[int, int]]
    ) -> tuple[dict[str, torch.Tensor], list[Target]]:
        """As `losses` and as `forward`, with one pass through the backbone."""
        maps, own = self.maps(images), tuple(images.shape[-2:])
        losses, found = self.head(maps, own, targets), self.head(maps, own)
        return losses, [at_size(image, own, size) for image, size in zip(found, sizes, strict=True)]

    def get_classifier(self) -> nn.Module:
        """The head, under the name timm uses."""
        return self.head


def at_size(found: Target, size: tuple[int, int], wanted: tuple[int, int]) -> Target:
    """What was found in an image of one height and width, in the pixels of another, with whole masks."""
    factors = [new / old for new, old in zip(wanted, size, strict=True)]
    boxes = found["boxes"].float() * found["boxes"].new_tensor([factors[1], factors[0]] * 2, dtype=torch.float)
    resized = {**found, "boxes": boxes, "scores": found["scores"].float()}
    if "masks" in found:
        whole = torch.zeros(len(boxes), *wanted, dtype=torch.bool, device=boxes.device)
        for index, mask in enumerate(found["masks"].float()):  # all at once are 4 bytes a pixel, twice over
            whole[index] = paste_masks_in_image(mask[None], boxes[index, None], wanted)[0, 0] > 0.5
        resized["masks"] = whole
    return resized


@describe_model.register
def _(model: ObjectDetector) -> Backbone:
    return describe_around(model)
