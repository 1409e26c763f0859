"""What blocks give at each patch, as heads for dense prediction read it."""

from collections.abc import Sequence

import torch
from timm.models.hiera import Hiera
from torch import nn

from visionpeft.adapters.carried_values import CARRYING
from visionpeft.adapters.library_methods import SHALLOW, NoIntermediates
from visionpeft.errors import ConfigurationError, UnsupportedError, one_line
from visionpeft.models.image_classifier import ImageClassifier, has_trunk, is_native


def feature_maps(backbone: nn.Module, images: torch.Tensor, blocks: Sequence[int]) -> torch.Tensor | list[torch.Tensor]:
    """Tokens of the patches after some blocks, each after the backbone's final norm if it has one, in a grid.

    By the library's own `forward_intermediates`, with the adapters acting. Prompts that travel through the blocks are
    left out, like class and register tokens. Images of another size than the backbone's are taken by timm models
    made with `dynamic_img_size=True`, which interpolate their position embeddings, by those with rotary ones, and by
    ConvNeXt and SAM 2's Hiera. A backbone in stages (Swin, ConvNeXt, Hiera) gives the map of each stage as the stage
    leaves it: its final norm is made for the last one alone, and what reads several maps has a norm for each.

    Args:
        backbone: a timm model, an `ImageClassifier` or an OpenCLIP image tower, with adapters or without.
        images: (batch, 3, height, width), whose sides are multiples of the patch's, or of the last stage's stride.
        blocks: numbers of the blocks, from 0, ascending; of a backbone in stages, of the stages.

    Returns:
        (batch, len(blocks), width, height / patch, width / patch); of a backbone in stages a list of their maps (batch,
        width, height / stride, width / stride), each of its own width and stride.

    Raises:
        UnsupportedError: the model cannot give the tokens of its patches, or an economy has left them out.
        ConfigurationError: images of a size that the backbone does not take.
    """
    tower = tower_of(backbone)
    if len({info["reduction"] for info in getattr(tower, "feature_info", ())}) > 1:  # in stages
        return list(_read(tower, images, blocks, output_fmt="NCHW"))
    patch = tower.conv1.kernel_size if is_native(tower) else tower.patch_embed.patch_size
    grid = [side // size for side, size in zip(images.shape[-2:], patch, strict=True)]
    # prompts come after class and register tokens and before the patches
    patches = [tokens[:, -grid[0] * grid[1] :] for tokens in normalised_tokens(backbone, images, blocks)]
    return torch.stack(patches, dim=1).unflatten(2, grid).movedim(-1, 2)


def tower_of(backbone: nn.Module) -> nn.Module:
    """The image tower of a backbone: a timm model, or one of OpenCLIP's own."""
    tower = backbone.visual if isinstance(backbone, ImageClassifier) else backbone
    return tower.trunk if has_trunk(tower) else tower


def only_size(backbone: nn.Module) -> tuple[int, int] | None:
    """The only height and width of images that a backbone takes; None where it takes others, too."""
    tower = tower_of(backbone)
    if is_native(tower):
        return tuple(tower.image_size)
    if isinstance(tower, Hiera):
        return tuple(_size_of_hiera(tower))
    patches = getattr(tower, "patch_embed", None)
    return tuple(patches.img_size) if getattr(patches, "strict_img_size", False) and patches.img_size else None


def _size_of_hiera(tower: Hiera) -> list[int]:
    return [side * step for side, step in zip(tower.tokens_spatial_shape, tower.patch_stride, strict=True)]


def normalised_tokens(backbone: nn.Module, images: torch.Tensor, blocks: Sequence[int]) -> Sequence[torch.Tensor]:
    """Tokens (batch, tokens, width) after some blocks and the final norm, without class and register tokens.

    Raises:
        UnsupportedError: as `feature_maps`.
        ConfigurationError: likewise.
    """
    tower = tower_of(backbone)
    native = is_native(tower)
    height, width = images.shape[-2:]
    if native and (height, width) != tuple(tower.image_size):
        sizes = " x ".join(map(str, tower.image_size))
        raise ConfigurationError(
            f"this OpenCLIP tower takes images of {sizes} pixels, not {height} x {width}; use windows of its own size, "
            "or make it with force_image_size"
        )
    options = {"normalize_intermediates": True} if native else {"norm": True}
    # NLC, because what is left out here has to be left out before tokens can be put into rows and columns
    maps = _read(tower, images, blocks, output_fmt="NLC", **options)
    return maps["image_intermediates"] if native else maps


def _read(tower: nn.Module, images: torch.Tensor, blocks: Sequence[int], **options) -> Sequence | dict:
    """What the library's `forward_intermediates` gives with these options."""
    read = _intermediates(tower)
    height, width = images.shape[-2:]
    if isinstance(tower, Hiera):  # which would fail on the sum of tokens and position embeddings
        own = _size_of_hiera(tower)
        if own != [height, width]:
            raise ConfigurationError(
                f"{type(tower).__name__} takes images of {' x '.join(map(str, own))} pixels, not {height} x {width}; "
                f"make it with img_size=({height}, {width}), use windows of its own size, or take a SAM 2 Hiera"
            )
    try:
        return read(images, indices=list(blocks), intermediates_only=True, **options)
    except AssertionError as error:  # how timm refuses a size
        raise ConfigurationError(
            f"{type(tower).__name__} does not take images of {height} x {width} pixels ({one_line(error)}); a timm "
            "backbone made with dynamic_img_size=True takes images of any size"
        ) from error


def _intermediates(tower: nn.Module):
    """The library's method, also while travelling prompts have it refused, as they are left out here."""
    read = getattr(tower, "forward_intermediates", None)
    if read is None:
        raise UnsupportedError(
            f"{type(tower).__name__} has no forward_intermediates, so that no head can read its maps"
        )
    if isinstance(read, NoIntermediates) and read.why == SHALLOW:
        return type(tower).forward_intermediates.__get__(tower)
    if isinstance(read, NoIntermediates) and read.why == CARRYING:
        raise UnsupportedError(
            f"no head can read the maps of blocks while {CARRYING}, as by LST; choose another method"
        )
    return read
