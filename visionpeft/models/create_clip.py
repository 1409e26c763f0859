"""Create a CLIP model with its tokenizer by name: the embedded `nano_clip`, or any OpenCLIP model."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import open_clip
import torch.nn as nn

from visionpeft.errors import ConfigurationError, StorageError, advice, near
from visionpeft.models.embedded import NANO_CLIPS
from visionpeft.models.nano_clip import load_nano_clip
from visionpeft.models.open_clip import create_open_clip


def create_clip(
    name: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    **kwargs,
) -> tuple[nn.Module, Callable]:
    """Build a CLIP model, load its weights, and get its tokenizer.

    The model carries `backbone_source`, a plain dictionary with the arguments given here, so that a saved learner can
    name the model it belongs to.

    Args:
        name: `nano_clip` or the better `nano_clip.distilled` (weights in the package), or `open_clip/<model>/<tag>`
            such as `open_clip/ViT-B-16-quickgelu/openai`.
        pretrained: load the published weights, downloading them when they are not cached.
        checkpoint: a local file to load instead.
        **kwargs: passed on to `open_clip.create_model`.

    Raises:
        ConfigurationError: the name or tag does not exist, the tag was trained with QuickGELU and the model has none
            (or the other way round), or the weights cannot be downloaded.
        StorageError: the checkpoint cannot be read or does not fit.
    """
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise StorageError(f"there is no checkpoint file {checkpoint}")
    if name in NANO_CLIPS:
        if kwargs or checkpoint is not None or not pretrained:
            raise ConfigurationError(f"{name} takes no further arguments; its weights are in the package")
        clip, tokenizer = load_nano_clip(name), _tokenizer(None)
    elif name.startswith("open_clip/"):
        clip = create_open_clip(name, pretrained, checkpoint, **kwargs)
        model = name.split("/")[1]
        configuration = open_clip.get_model_config(model)
        # One of Hugging Face is not for several threads at once, such as those of a service of many learners.
        shared = "hf_tokenizer_name" not in configuration["text_cfg"]
        tokenizer = _tokenizer(model, repr(configuration)) if shared else open_clip.get_tokenizer(model)
    else:
        raise ConfigurationError(
            f"there is no CLIP model {name!r}; {advice(near(name, NANO_CLIPS))}use nano_clip.distilled, or "
            "open_clip/<model>/<tag> such as open_clip/ViT-B-16-quickgelu/openai"
        )
    clip.backbone_source = {
        "library": "open_clip",
        "name": name,
        "pretrained": pretrained,
        "kwargs": kwargs,
        "checkpoint": None if checkpoint is None else str(checkpoint),
    }
    return clip.eval(), tokenizer


@cache
def _tokenizer(model: str | None, configuration: str | None = None) -> Callable:
    """OpenCLIP's own tokenizer, as a model of this configuration has it, or by default.

    It does not change, and to read its vocabulary takes longer than to build a small CLIP: one serves all models.
    """
    return open_clip.tokenizer.SimpleTokenizer() if model is None else open_clip.get_tokenizer(model)
