"""Create an OpenCLIP model by name, `open_clip/<model>/<tag>`."""

import pickle
from pathlib import Path

import open_clip
from torch import nn

from visionpeft.errors import ConfigurationError, StorageError, advice, near, one_line
from visionpeft.models.network import fetched


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
        near_it = near(model_name, open_clip.list_models())  # all names would be too many to list
        raise ConfigurationError(
            f"OpenCLIP has no model {model_name!r}; {advice(near_it)}see open_clip.list_models() for all names"
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
        return fetched(name, create) if weights == tag and weights is not None else create()
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
