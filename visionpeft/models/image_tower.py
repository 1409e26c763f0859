"""What a model whose head reads every patch does with the backbone in it: check it, fill up images, describe it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from visionpeft.backbones.dispatch import describe_model
from visionpeft.backbones.tower import Backbone, Tower
from visionpeft.backbones.whole_model import describe
from visionpeft.errors import ConfigurationError, StorageError, UnsupportedError
from visionpeft.heads import DenseHead


def image_tower(backbone: nn.Module, reader: str) -> Tower:
    """The tower of a model of images alone, with sited blocks.

    Args:
        backbone: the model.
        reader: what is to read it, with its article, for errors.

    Raises:
        UnsupportedError: it is another model, or its blocks are not sited.
    """
    towers = describe(backbone).towers
    if "visual" not in towers or "text" in towers:
        raise UnsupportedError(
            f"{reader} takes a model of images alone, not a {type(backbone).__name__}; of a CLIP give its image tower, "
            ".visual"
        )
    if towers["visual"].layers_only is not None:
        raise UnsupportedError(f"{reader} needs sited blocks; {towers['visual'].layers_only}")
    if towers["visual"].common_width is not None and any(block.on_map for block in towers["visual"].blocks):
        kind = type(towers["visual"].module).__name__
        raise UnsupportedError(f"{reader} reads tokens in a line, but those of {kind} are the pixels of a map")
    return towers["visual"]


def what_is_read(head: DenseHead, tower: Tower, reader: str) -> tuple[tuple[int, ...], int | list[int], list[int]]:
    """Numbers of the blocks or stages that a head reads of a tower, their channels, and the strides of such stages.

    Args:
        head: the head.
        tower: as `image_tower` gives it.
        reader: what is to read it, with its article, for errors.

    Returns:
        Of a tower whose blocks are alike one number of channels and no strides.

    Raises:
        ConfigurationError: the tower does not have them.
        UnsupportedError: patches of a tower in stages that are no squares.
    """
    if not tower.stages:
        return head.blocks(tower.depth), tower.width, []
    if len(set(tower.patch_size)) > 1:
        raise UnsupportedError(f"{reader} reads stages of square patches, not of {tower.patch_size} pixels")
    chosen = head.stages(len(tower.stages))
    return chosen, [tower.stage_widths[stage] for stage in chosen], [tower.strides[stage] for stage in chosen]


def check_read(head: DenseHead, read: Sequence[int], number: int, in_stages: bool, reader: str) -> None:
    """Refuse the saved head of an adapter that reads other blocks or stages than those that a model has read for it.

    Their maps could have the shapes that it wants all the same, so that what it gives would be wrong in silence.

    Args:
        head: the head.
        read: numbers of the blocks, or stages, whose maps the model gives.
        number: how many the backbone has.
        in_stages: whether these are stages.
        reader: the model, with its article, for errors.

    Raises:
        StorageError: it reads others.
    """
    wanted = head.stages(number) if in_stages else head.blocks(number)
    if wanted != tuple(read):
        theirs, own = (
            f"{'stage' if in_stages else 'block'}{'s' if len(each) > 1 else ''} {', '.join(map(str, each))}"
            for each in (wanted, read)
        )
        raise StorageError(
            f"the saved head {type(head).__name__} reads {theirs}, and this model gives its head {own}; make {reader} "
            f"with {head!r}"
        )


def filled_up(images: torch.Tensor, patch: Sequence[int], reader: str) -> torch.Tensor:
    """Images (batch, channels, height, width) with zeros on the right and at the bottom, up to whole patches.

    Raises:
        ConfigurationError: another number of dimensions.
    """
    if images.ndim != 4:
        raise ConfigurationError(
            f"{reader} takes images (batch, channels, height, width), not a tensor of shape {tuple(images.shape)}"
        )
    rows, columns = (-side % own for side, own in zip(images.shape[-2:], patch, strict=True))
    return F.pad(images, (0, columns, 0, rows)) if rows or columns else images


def describe_around(model: nn.Module) -> Backbone:
    """A model with a `backbone`, of which every patch is read, and a `head` of its own."""
    inside = describe_model(model.backbone)
    tower = inside.towers["visual"]
    tower.path = f"backbone.{tower.path}".rstrip(".")
    tower.pools_class_token = False
    if tower.stages:
        _leave_out_final_norms(tower)
    unused = tuple(f"backbone.{path}" for path in inside.heads)
    return Backbone(inside.library, inside.name, model, {"visual": tower}, ("head",), unused_heads=unused, pools=False)


def _leave_out_final_norms(tower: Tower) -> None:
    """Describe a tower without the norms after its last stage, which nothing computes where its maps are read."""
    norms = [tower.layers.pop(site).owner for site in tower.final_norms if site in tower.layers]
    unread = {id(parameter) for norm in norms for parameter in norm.parameters()}
    names = {name for name, parameter in tower.module.named_parameters() if id(parameter) in unread}
    tower.unreached = tower.unreached | names
