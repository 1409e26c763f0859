"""A backbone with a head that gives logits at every pixel."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from visionpeft.adapters.adapters import has_adapters
from visionpeft.adapters.attach import attach
from visionpeft.backbones.dispatch import describe_model
from visionpeft.backbones.tower import Backbone
from visionpeft.errors import ConfigurationError, StorageError, UnsupportedError
from visionpeft.heads import DenseHead, DetectionHead, LinearSegmentation
from visionpeft.heads.mask_classification import MaskModule, MaskPredictions
from visionpeft.methods.parts.base import Method
from visionpeft.methods.parts.field_types import as_python
from visionpeft.models.create import create_dense_backbone
from visionpeft.models.feature_maps import feature_maps
from visionpeft.models.image_tower import check_read, describe_around, filled_up, image_tower, what_is_read
from visionpeft.models.queries import check_queried, through_last_blocks
from visionpeft.models.strips import largest, resized
from visionpeft.sites.stand_ins import acting_head

LINEAR = LinearSegmentation()
READER = "a DensePredictor"


class DensePredictor(nn.Module):
    """Logits at every pixel: head(maps of the backbone's blocks), resized bilinearly to the image.

    Backbone, head and method do not know each other: any head reads any backbone by `feature_maps`, with any method
    attached. `attach`, `save`, `load` and everything else take this model, not the backbone in it; the head belongs to
    the adapter and is saved with it. Images whose sides are no multiples of the patch's, or of the stride of a
    backbone's last stage, are filled with zeros on the right and at the bottom; what is predicted there is cut away.

    Shapes: images (batch, 3, height, width) -> logits (batch, classes, height, width).

    Args:
        backbone: a timm model, an `ImageClassifier` or an OpenCLIP image tower, which stays as it is; a classifier of
            its own is not used. A name is made by `create_backbone`, so that it takes images of any size where it can.
        head: what is built on the blocks' maps.
        classes: names of the classes, or their number.
        method: a method or several, attached as the adapter "default"; None to attach later.
        recompute_head: compute the activations of the head again in the backward pass instead of keeping them; exact.

    Raises:
        UnsupportedError: the backbone is no supported model of images, or the method does not fit it.
        ConfigurationError: fewer than two classes, or the head reads blocks that the backbone does not have.
    """

    def __init__(
        self,
        backbone: nn.Module | str,
        head: DenseHead = LINEAR,
        classes: Sequence[str] | int = 2,
        method: Method | Sequence[Method] | None = None,
        *,
        recompute_head: bool = True,
    ):
        super().__init__()
        classes = as_python(classes)
        number = classes if isinstance(classes, int) else len(classes)
        if isinstance(classes, bool | str) or number < 2:
            raise ConfigurationError(f"classes must be a list of at least two names, or their number, not {classes!r}")
        if not isinstance(head, DenseHead) or isinstance(head, DetectionHead):
            raise ConfigurationError(f"head must be a head such as LinearSegmentation(layers=4), not {head!r}")
        backbone = create_dense_backbone(backbone) if isinstance(backbone, str) else backbone
        tower = image_tower(backbone, READER)
        self.backbone = backbone
        self.blocks, channels, _ = what_is_read(head, tower, READER)
        self.in_stages, self.depth = bool(tower.stages), len(tower.stages) or tower.depth
        self.patch_size = (tower.strides[-1],) * 2 if tower.stages else tuple(tower.patch_size)
        like = next(backbone.parameters())
        self.head = head.make(channels, len(self.blocks), number).to(like.device, like.dtype)
        if (queried := self.head.queried_blocks) > tower.depth:
            raise ConfigurationError(f"queries cannot go through {queried} blocks of a backbone that has {tower.depth}")
        self.queries_need_sites = any(block.knows_positions for block in tower.blocks[tower.depth - queried :])
        if queried:
            check_queried([block.module for block in tower.blocks[-queried:]], knows_positions=False)
        self.recompute_head = recompute_head
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
            StorageError: it reads other blocks or stages, or its queries go through another number of blocks.
        """
        check_read(head, self.blocks, self.depth, self.in_stages, READER)
        numbers = module.queried_blocks, self.head.queried_blocks
        if len(set(numbers)) > 1:
            theirs, own = (f"the last {each}" if each else "none" for each in numbers)
            raise StorageError(
                f"of the backbone's blocks {theirs} compute queries of the saved head {type(head).__name__}, and {own} "
                f"those of this model's head; make {READER} with {head!r}"
            )

    def coarse_logits(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes, rows, columns) at the resolution of the head, of images filled up to whole patches.

        They cover `1 / shares` of the image; see `shares`. Of a head that `gives_scores` they are scores.
        """
        output = self.head_output(images)
        return output.scores if isinstance(output, MaskPredictions) else output

    def head_output(self, images: torch.Tensor) -> torch.Tensor | MaskPredictions:
        """What the head gives for images filled up to whole patches.

        It is `coarse_logits`, except that heads of queries give `MaskPredictions` while they are trained, of which
        `mask_classification_loss` is the loss.
        """
        images = filled_up(images, self.patch_size, READER)
        if self.head.queried_blocks:
            return self._with_queries(images)
        maps = feature_maps(self.backbone, images, self.blocks)
        # compiled, it is the compiler that decides what is kept
        if not (self.recompute_head and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return self.head(maps)
        contexts = {"context_fn": lambda: (nullcontext(), _statistics_kept(self))}
        return checkpoint(self.head, maps, use_reentrant=False, **contexts)

    def _with_queries(self, images: torch.Tensor) -> torch.Tensor | MaskPredictions:
        """What a head gives whose queries go through the backbone's last blocks."""
        if has_adapters(self) and self.peft.routing.opened:
            raise UnsupportedError("queries of several heads cannot go through the backbone together; leave the route")
        head = acting_head(self.head)
        found = MaskPredictions([], [])

        def look(index: int | None, queries: torch.Tensor, patches: torch.Tensor) -> torch.Tensor | None:
            masked = head.training and head.masked
            if index is not None and not masked:
                return None
            tokens = [each.to(head.queries.dtype) for each in (queries, patches)]
            again = self.recompute_head and torch.is_grad_enabled()
            predict = partial(checkpoint, head.predict, use_reentrant=False) if again else head.predict
            masks, classes = predict(*tokens)
            found.masks.append(masks)
            found.classes.append(classes)
            return None if index is None else head.open(masks, patches.shape[-2:], index, head.queried_blocks)

        through_last_blocks(self.backbone, images, head.queries, head.queried_blocks, self.queries_need_sites, look)
        return head.answered(found)

    def shares(self, size: Sequence[int]) -> tuple[float, float]:
        """Which part of the extent of `coarse_logits` an image of this height and width covers."""
        height, width = (side / (math.ceil(side / p) * p) for side, p in zip(size, self.patch_size, strict=True))
        return height, width

    def forward(self, images: torch.Tensor, *, at_image_size: bool = True) -> torch.Tensor | MaskPredictions:
        """Logits (batch, classes, height, width), or what `head_output` gives."""
        if not at_image_size:
            return self.head_output(images)
        size = images.shape[-2:]
        return resized(self.coarse_logits(images), tuple(size), self.shares(size))

    def decide(self, logits: torch.Tensor) -> torch.Tensor:
        """Class indices (batch, height, width) of logits (batch, classes, height, width): those of the largest."""
        return largest(logits)

    def set_progress(self, share: float) -> None:
        """Say how much of the training is over, from 0 to 1; on it depends what heads of queries mask."""
        for module in self.modules():
            if isinstance(module, MaskModule):
                module.progress = share

    def get_classifier(self) -> nn.Module:
        """The head, under the name timm uses."""
        return self.head


@describe_model.register
def _(model: DensePredictor) -> Backbone:
    described = describe_around(model)
    described.towers["visual"].queried_blocks = model.head.queried_blocks
    return described


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """Within the context, batch normalisations compute as before, and leave their running statistics as they are."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # running * (1 - 0) + batch * 0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
