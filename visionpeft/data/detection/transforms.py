"""Images and their objects together: resizing, random scaling, cropping and mirroring, colours."""

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from visionpeft.data.detection.objects import Objects, box_of
from visionpeft.data.ordering import mix
from visionpeft.data.segmentation.transforms import MaskedTransform

SMALLEST = 1.0  # pixels of a side; what is left of a box after a cut may be less

Target = dict[str, torch.Tensor]


class ObjectTransform(MaskedTransform):
    """What is done to an image and its objects, and then to a batch of images.

    Sizes, cuts, mirroring and colours are those of `MaskedTransform`, by torchvision's v2 transforms. Boxes are cut
    with the image; where there are masks, a box is drawn anew around what is left of its mask. Objects of which less
    than a pixel is left in a direction are no targets, and crowds never are.

    Args:
        preprocessing: how the backbone wants its images.
        size: pixels.
        scale: smallest and largest factor while training.
        flip: mirror half of the images while training.
        distort: change brightness, contrast, saturation and hue while training.
    """

    outside = 0  # no object

    def train(self, image: Image.Image, objects: Objects, *seeds: int) -> tuple[torch.Tensor, Target]:
        """uint8 (3, size, size) and what is to be found in it, drawn by `seeds` alone."""
        with torch.random.fork_rng(devices=[]):
            # The CPU generator only: torch.manual_seed would also reset the accelerator's.
            torch.default_generator.manual_seed(int(mix(*seeds)[0] >> 1))
            low, high = self.scale
            factor = low + (high - low) * torch.rand(()).item()
            resized = self._resized(image, max(1, round(self.size * factor)))
            pixels, target = self._random(
                tv_tensors.Image(F.pil_to_tensor(resized)), self._as_resized(objects, image, resized)
            )
        return pixels.as_subclass(torch.Tensor), _plain(target)

    def measured(self, image: Image.Image, objects: Objects) -> tuple[torch.Tensor, Target]:
        """uint8 (3, h, w) whose shorter side is `size`, and what is to be found in it, in its pixels."""
        resized = self._resized(image, self.size)
        return F.pil_to_tensor(resized), _plain(self._as_resized(objects, image, resized))

    def _as_resized(self, objects: Objects, image: Image.Image, resized: Image.Image) -> Target:
        """Boxes, labels and masks in the pixels of the resized image."""
        kept = ~objects.crowd
        size = resized.height, resized.width
        boxes = objects.boxes[kept] * (np.array([resized.width, resized.height] * 2) / ([*image.size] * 2))
        target = {
            "boxes": tv_tensors.BoundingBoxes(torch.from_numpy(boxes).float(), format="XYXY", canvas_size=size),
            "labels": torch.from_numpy(objects.labels[kept]),
        }
        target["boxes"] = F.clamp_bounding_boxes(target["boxes"])
        if objects.masks is not None:
            masks = tv_tensors.Mask(torch.from_numpy(objects.masks[kept].astype(np.uint8)))
            # v2 cannot resize no masks
            target["masks"] = (
                F.resize(masks, list(size), interpolation=InterpolationMode.NEAREST_EXACT)
                if len(masks)
                else tv_tensors.Mask(torch.zeros((0, *size), dtype=torch.uint8))
            )
        return target


def _plain(target: Target) -> Target:
    """Tensors of what is left after a cut, without the rest."""
    boxes, labels = target["boxes"].as_subclass(torch.Tensor), target["labels"]
    masks = target.get("masks")
    if masks is not None:
        masks = masks.as_subclass(torch.Tensor)
        boxes = torch.tensor([box_of(mask.numpy()) or (0,) * 4 for mask in masks], dtype=torch.float).reshape(-1, 4)
    left = ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST).all(1)
    return {"boxes": boxes[left], "labels": labels[left], **({} if masks is None else {"masks": masks[left]})}
