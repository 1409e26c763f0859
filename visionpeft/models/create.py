"""Create a backbone by name: the embedded `nano_vit`, any timm model, or the image tower of any OpenCLIP model."""

import pickle
from collections.abc import Callable
from pathlib import Path

import open_clip
import timm
from torch import nn

from visionpeft.errors import ConfigurationError, StorageError, one_line
from visionpeft.models.checkpoints import load_timm_checkpoint
from visionpeft.models.image_classifier import ImageClassifier
from visionpeft.models.network import offline_if_unreachable
from visionpeft.naming import near

NANO_VIT = Path(__file__).parent.parent / "weights" / "nano_vit"


def create_backbone(
    name: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    num_classes: int = 0,
    **kwargs,
) -> nn.Module:
    """Build a model and load its weights.

    The returned model carries `backbone_source`, a plain dictionary with the arguments given here, so that a saved
    adapter can name the model it belongs to.

    Args:
        name: `nano_vit` (weights in the package), a timm name with or without tag such as
            `vit_base_patch16_224.orig_in21k`, or `open_clip/<model>/<tag>` for the image tower of an OpenCLIP model,
            such as `open_clip/ViT-B-16/laion2b_s34b_b88k`.
        pretrained: load the published weights, downloading them when they are not cached.
        checkpoint: a local file to load instead: `.safetensors`, `.pth`/`.pt`/`.bin` (tensors only) or `.npz`
            (the format of Google's ViT releases; timm models only). Nothing is downloaded.
        num_classes: outputs of the linear head; 0 leaves the head out.
        **kwargs: passed on to `timm.create_model` or `open_clip.create_model`; `projected=True` keeps the projection
            of an OpenCLIP tower.

    Raises:
        ConfigurationError: the name or tag does not exist, the weights cannot be downloaded, or the library refuses
            an argument.
        StorageError: the checkpoint cannot be read or does not fit.
    """
    source = {
        "library": "open_clip" if name.startswith("open_clip/") else "timm",
        "name": name,
        "pretrained": pretrained,
        "kwargs": kwargs,
        "checkpoint": None if checkpoint is None else str(checkpoint),
    }
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise StorageError(f"there is no checkpoint file {checkpoint}")
    if source["library"] == "open_clip":
        model = _create_open_clip(name, pretrained, checkpoint, num_classes, **kwargs)
    else:
        model = _create_timm(name, pretrained, checkpoint, num_classes, **kwargs)
    model.backbone_source = source
    return model


def _create_timm(name: str, pretrained: bool, checkpoint, num_classes: int, **kwargs) -> nn.Module:
    _check_timm_name(name)
    timm_name = f"local-dir:{NANO_VIT}" if name == "nano_vit" else name
    load = pretrained and checkpoint is None

    def create() -> nn.Module:
        return timm.create_model(timm_name, pretrained=load, num_classes=num_classes, **kwargs)

    try:
        model = _download(name, create) if load and name != "nano_vit" else create()
    except TypeError as error:
        raise ConfigurationError(f"backbone {name} does not take these arguments: {error}") from error
    if checkpoint is not None:
        load_timm_checkpoint(model, Path(checkpoint))
    return model


def _check_timm_name(name: str) -> None:
    if name == "nano_vit" or name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ConfigurationError(
            f"there is no backbone {name!r}; {_did_you_mean(architecture, ['nano_vit', *timm.list_models()])}"
            "use nano_vit, a name of timm.list_models(), or open_clip/<model>/<tag>"
        )
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ConfigurationError(f"backbone {architecture} has no weights {tag!r}; it has {', '.join(tags) or 'none'}")


def _create_open_clip(name: str, pretrained: bool, checkpoint, num_classes: int, *, projected=False, **kwargs):
    clip = create_open_clip(name, pretrained, checkpoint, **kwargs)
    return ImageClassifier(clip.visual, num_classes, projected)


def create_open_clip(name: str, pretrained: bool, checkpoint: str | Path | None, **kwargs) -> nn.Module:
    """Build an OpenCLIP model, `open_clip/<model>/<tag>`, and load its weights.

    Raises:
        ConfigurationError: the name or tag does not exist, the tag was trained with another activation function, the
            weights cannot be downloaded, or OpenCLIP refuses an argument.
        StorageError: the checkpoint cannot be read or does not fit.
    """
    _, model_name, *rest = name.split("/")
    tag = rest[0] if rest else None
    if model_name not in open_clip.list_models():
        advice = _did_you_mean(model_name, open_clip.list_models())
        raise ConfigurationError(
            f"OpenCLIP has no model {model_name!r}; {advice}see open_clip.list_models() for all names"
        )
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if tag is not None:
        _check_open_clip_tag(model_name, tag, tags)
    if checkpoint is not None:
        weights = str(checkpoint)
    elif pretrained and tag is None:
        raise ConfigurationError(
            f"name the weights of {name}: {name}/<tag> with one of {', '.join(tags) or 'no published tag'}, "
            "give checkpoint=, or pretrained=False"
        )
    else:
        weights = tag if pretrained else None

    def create() -> nn.Module:
        return open_clip.create_model(model_name, pretrained=weights, pretrained_text=False, **kwargs)

    try:
        return _download(name, create) if weights == tag and weights is not None else create()
    except TypeError as error:
        raise ConfigurationError(f"backbone {name} does not take these arguments: {error}") from error
    except (RuntimeError, pickle.UnpicklingError, OSError) as error:
        if checkpoint is None:
            raise
        raise StorageError(f"{checkpoint} does not fit OpenCLIP {model_name}: {one_line(error)}") from error


def _check_open_clip_tag(model_name: str, tag: str, tags: list[str]) -> None:
    if tag not in tags:
        raise ConfigurationError(f"OpenCLIP {model_name} has no weights {tag!r}; it has {', '.join(tags) or 'none'}")
    trained_with = bool(open_clip.get_pretrained_cfg(model_name, tag).get("quick_gelu", False))
    built_with = bool(open_clip.get_model_config(model_name).get("quick_gelu", False))
    if trained_with == built_with:
        return
    plain = model_name.removesuffix("-quickgelu")
    right = f"{plain}-quickgelu" if trained_with else plain
    raise ConfigurationError(
        f"the weights {tag} of OpenCLIP {plain} were trained {'with' if trained_with else 'without'} QuickGELU, "
        f"but {model_name} is built {'with' if built_with else 'without'} it; use open_clip/{right}/{tag}"
    )


def _download(name: str, create: Callable[[], nn.Module]) -> nn.Module:
    """Run `create`, which may fetch weights; without network only weights in the cache can be had."""
    with offline_if_unreachable() as offline:
        try:
            return create()
        except TypeError:
            raise
        except Exception as error:
            reason = "no network, and they are not in the cache" if offline else one_line(error)
            raise ConfigurationError(
                f"the weights of {name} could not be loaded ({reason}); give a local file of them with checkpoint=, "
                "or use the backbone nano_vit, whose weights are in the package"
            ) from error


def _did_you_mean(name: str, allowed: list[str]) -> str:
    found = near(name, allowed)  # all names would be too many to list
    return f"did you mean {' or '.join(found)}? " if found else ""
