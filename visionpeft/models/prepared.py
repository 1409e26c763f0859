"""Backbones whose weights `python -m visionpeft.prepare backbone` makes of a file that others publish."""

from dataclasses import dataclass
from pathlib import Path

from visionpeft.errors import ConfigurationError
from visionpeft.files import cache_folder


@dataclass(frozen=True)
class PreparedBackbone:
    """A timm architecture with weights that lie in the user's cache folder.

    Args:
        architecture: its name in timm.
        arguments: what `timm.create_model` is given unless told otherwise, the image size among it.
        prepared_as: what to give to `python -m visionpeft.prepare backbone`.
    """

    architecture: str
    arguments: dict
    prepared_as: str


PREPARED = {"dinov2_small_focus": PreparedBackbone("vit_small_patch14_dinov2", {"img_size": 224}, "dinov2_small")}


def weights_folder(name: str) -> Path:
    """Where the weights of a prepared backbone are, or will be."""
    return cache_folder() / "backbones" / name


def prepared_weights(name: str) -> Path:
    """The file of the weights of a prepared backbone, for timm.

    Raises:
        ConfigurationError: they have not been made.
    """
    file = weights_folder(name) / "model.safetensors"
    if not file.is_file():
        raise ConfigurationError(
            f"the weights of {name} are not in {file.parent}; make them with python -m visionpeft.prepare backbone "
            f"{PREPARED[name].prepared_as}, or create it untrained with pretrained=False"
        )
    return file
