"""Create a backbone by name: `nano_vit`, a prepared one, any timm model, or the image tower of any OpenCLIP model."""

from pathlib import Path

import timm
from torch import nn

from visionpeft.errors import ConfigurationError, StorageError, advice, near
from visionpeft.models.checkpoints import load_timm_checkpoint
from visionpeft.models.embedded import NANO_CLIPS, NANO_VITS
from visionpeft.models.network import fetched
from visionpeft.models.prepared import PREPARED, prepared_weights

# timm's files whose models take images of any size when they are made with dynamic_img_size=True
VIT = "timm.models.vision_transformer"
SWIN = "timm.models.swin_transformer"
ANY_SIZE = (
    *("vision_transformer", "vision_transformer_hybrid", "deit", "eva"),
    *("swin_transformer", "swin_transformer_v2"),
)


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
        name: `nano_vit` or the better `nano_vit.distilled` (weights in the package), `dinov2_small_focus` (made by
            `python -m visionpeft.prepare backbone dinov2_small`), a timm name with or without tag such as
            `vit_base_patch16_224.orig_in21k`, or `open_clip/<model>/<tag>` for the image tower of an OpenCLIP model,
            such as `open_clip/ViT-B-16/laion2b_s34b_b88k`.
        pretrained: load the published weights, downloading them when they are not cached.
        checkpoint: a local file to load instead: `.safetensors`, `.pth`/`.pt`/`.bin` (tensors only) or `.npz`
            (the format of Google's ViT releases; timm models only). Nothing is downloaded.
        num_classes: outputs of the linear head; 0 leaves the head out.
        **kwargs: passed on to `timm.create_model` or `open_clip.create_model`; `projected=True` keeps the projection
            of an OpenCLIP tower.

    Raises:
        ConfigurationError: the name or tag does not exist, the weights cannot be downloaded or have not been
            prepared, or the library refuses an argument.
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


def create_dense_backbone(name: str, **kwargs) -> nn.Module:
    """As `create_backbone`, without a classifier; a timm model is made so that it takes images of any size if it can.

    Swin keeps its windows and their shift in maps of every size (`always_partition=True`), as where it was published
    for segmentation and detection; timm would leave out the shift where a map of its own size fits into one window.

    Args:
        name: as for `create_backbone`.
        **kwargs: the same; `dynamic_img_size` and `always_partition` as given.
    """
    if not name.startswith("open_clip/") and "dynamic_img_size" not in kwargs:
        _check_timm_name(name)
        architecture = name.rpartition("/")[2].partition(".")[0]
        known = timm.is_model(architecture)  # nano_vit and the prepared ones are ViTs, as are most of the Hub
        home = timm.model_entrypoint(architecture).__module__ if known else VIT
        if home.rpartition(".")[2] in ANY_SIZE:
            kwargs["dynamic_img_size"] = True
        if home == SWIN:  # findings/timm_swin_of_any_size_leaves_its_last_windows_unshifted.sh
            kwargs = {"always_partition": True} | kwargs
    return create_backbone(name, num_classes=0, **kwargs)


def _create_timm(name: str, pretrained: bool, checkpoint, num_classes: int, **kwargs) -> nn.Module:
    _check_timm_name(name)
    timm_name = f"local-dir:{NANO_VITS[name]}" if name in NANO_VITS else name
    if name in PREPARED:
        timm_name = PREPARED[name].architecture
        kwargs = PREPARED[name].arguments | kwargs
        checkpoint = prepared_weights(name) if pretrained and checkpoint is None else checkpoint
    load = pretrained and checkpoint is None

    def create() -> nn.Module:
        return timm.create_model(timm_name, pretrained=load, num_classes=num_classes, **kwargs)

    try:
        model = fetched(name, create) if load and name not in NANO_VITS else create()
    except TypeError as error:
        raise ConfigurationError(f"backbone {name} does not take these arguments: {error}") from error
    if checkpoint is not None:
        load_timm_checkpoint(model, Path(checkpoint))
    return model


def _check_timm_name(name: str) -> None:
    if name in NANO_VITS or name in PREPARED or name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return
    if name in NANO_CLIPS:
        raise ConfigurationError(
            f"{name} is a CLIP, with class names in the place of a head: call create_clip({name!r}), or train it by a "
            "configuration of PromptLearning, such as fewshot_coop.yaml"
        )
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        own = [*NANO_VITS, *PREPARED]
        found = near(name, own) or near(architecture, [*own, *timm.list_models()])  # all would be too many to list
        raise ConfigurationError(
            f"there is no backbone {name!r}; {advice(found)}"
            "use nano_vit.distilled, a name of timm.list_models(), or open_clip/<model>/<tag>"
        )
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ConfigurationError(f"backbone {architecture} has no weights {tag!r}; it has {', '.join(tags) or 'none'}")


def _create_open_clip(name: str, pretrained: bool, checkpoint, num_classes: int, *, projected=False, **kwargs):
    # imported here, because OpenCLIP takes seconds and only its own towers need it
    from visionpeft.models.image_classifier import ImageClassifier
    from visionpeft.models.open_clip import create_open_clip

    clip = create_open_clip(name, pretrained, checkpoint, **kwargs)
    return ImageClassifier(clip.visual, num_classes, projected)
