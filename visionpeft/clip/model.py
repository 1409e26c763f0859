"""What a learner asks of an OpenCLIP model."""

from collections.abc import Sequence

import torch
import torch.nn as nn
from open_clip import CLIP, CoCa, CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer

from visionpeft.adapters.adapters import has_adapters
from visionpeft.adapters.storage import backbone_record, check_backbone, check_pooling
from visionpeft.backbones.wrapped import check_not_wrapped
from visionpeft.errors import ConfigurationError, StorageError, UnsupportedError


def check_clip(clip: nn.Module) -> None:
    """Refuse what is not an OpenCLIP model with two towers.

    Raises:
        UnsupportedError: anything else, a compiled model, or a CoCa in several precisions.
    """
    check_not_wrapped(clip)
    if not isinstance(clip, CLIP | CustomTextCLIP | CoCa):
        raise UnsupportedError(
            f"a learner needs an OpenCLIP model with an image and a text tower, as open_clip.create_model makes it, "
            f"not {type(clip).__name__}"
        )
    if isinstance(clip, CoCa) and _in_several_precisions(clip):
        raise UnsupportedError(
            'OpenCLIP 3.3.0 cannot compute with a CoCa built with precision "bf16" or "fp16", whose layers get tokens '
            'in float32; build it with "pure_bf16" or "pure_fp16", or with "fp32" for autocast'
        )


def _in_several_precisions(clip: nn.Module) -> bool:
    """Whether weights are kept in more than one; adapters and the scale of the logits, which are float32, aside."""
    named = clip.named_parameters()
    return len({each.dtype for name, each in named if each.ndim > 0 and not name.startswith("peft.")}) > 1


def acting_adapters(clip: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that act on a CLIP."""
    return clip.peft.active if has_adapters(clip) else ()


def check_acting(clip: nn.Module, built_with: Sequence[str], learner: str) -> None:
    """Refuse to compute with other adapters than those with which a learner of this name was built.

    Raises:
        ConfigurationError: others act on the CLIP now.
    """
    now = acting_adapters(clip)
    if now != built_with:
        raise ConfigurationError(
            f"on the CLIP of this {learner} now act {_listed(now)}, and it was built with {_listed(built_with)}; "
            "switch them with visionpeft.activate or visionpeft.disable, or give each learner a CLIP of its own"
        )


def check_same_clip(clip: nn.Module, description: dict, what: str, check_fingerprint: bool = True) -> None:
    """Refuse another CLIP than that on which a learner was trained, or one on which other adapters act.

    Args:
        clip: the CLIP model.
        description: what `read_saved` says of the learner.
        what: where it comes from, for an error.
        check_fingerprint: compare the weights, too.

    Raises:
        UnsupportedError: the model is no CLIP.
        StorageError: it is another one, or has other adapters.
    """
    check_clip(clip)
    actual = backbone_record(clip, check_fingerprint)
    check_backbone(clip, description["backbone"], actual, what)
    check_pooling(description["backbone"], actual, what)
    saved, acting = description["adapters"], acting_adapters(clip)
    if list(saved) != list(acting):
        raise StorageError(
            f"{what} was trained on a CLIP with {', '.join(saved) or 'no'} adapters acting, and this one has "
            f"{', '.join(acting) or 'none'}; take off the others (visionpeft.detach), and load and activate the same "
            "ones first (visionpeft.load, visionpeft.activate)"
        )


def _listed(names: Sequence[str]) -> str:
    return f"the adapters {', '.join(names)}" if names else "no adapters"


def check_images(clip: nn.Module, images: torch.Tensor) -> None:
    """Refuse images that the image tower does not take.

    Raises:
        ConfigurationError: no tensor of floating point numbers, another shape than (batch, 3, height, width), or
            another size.
    """
    check_prepared(images)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ConfigurationError(
            f"images must be (batch, 3, height, width), not {tuple(images.shape)}; convert gray images to RGB"
        )
    size = fixed_image_size(clip)
    if size is not None and tuple(images.shape[2:]) != size:
        raise ConfigurationError(
            f"images are {images.shape[2]} x {images.shape[3]}, and this CLIP takes {size[0]} x {size[1]}; resize "
            "them as its preprocessing says"
        )


def check_prepared(images: object) -> None:
    """Refuse images that were not prepared: in the precision of the tower, bytes would be numbers far too large.

    Raises:
        ConfigurationError: no tensor of floating point numbers.
    """
    # asked of what stands for a tensor in a trace, too, which says so itself if it has no answer
    if not hasattr(images, "is_floating_point") or not images.is_floating_point():
        kind = f"a tensor of {images.dtype}" if isinstance(images, torch.Tensor) else type(images).__name__
        raise ConfigurationError(
            f"images must be a tensor of floating point numbers, not {kind}; prepare each as the CLIP's preprocessing "
            "does, and stack them"
        )


def fixed_image_size(clip: nn.Module) -> tuple[int, int] | None:
    """Height and width of the images if the image tower takes no others, as OpenCLIP's own towers do, else None."""
    visual = clip.visual
    patches = getattr(getattr(visual, "trunk", None), "patch_embed", None)
    if not isinstance(visual, VisionTransformer | ModifiedResNet) and not getattr(patches, "strict_img_size", False):
        return None
    size = visual.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def image_dtype(clip: nn.Module) -> torch.dtype:
    """Precision of the images that the image tower takes: that of its first convolution."""
    parameters = list(clip.visual.parameters())
    return next((p for p in parameters if p.ndim == 4), parameters[0]).dtype
