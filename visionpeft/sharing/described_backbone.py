"""What a description may choose of the backbone it belongs to: what the model is, and nothing that loads or runs.

A description may come from anywhere. Its arguments go to `timm.create_model` or `open_clip.create_model`, which take,
beside the sizes of a model, paths to load, folders to write to and switches such as `weights_only`.
"""

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath

import timm
from torch import nn

from visionpeft.errors import ConfigurationError, StorageError

# Of OpenCLIP's arguments, those that only say what the model is.
OPEN_CLIP = frozenset({
    *("precision", "output_dict", "force_quick_gelu", "force_custom_text", "force_patch_dropout", "force_image_size"),
    *("force_context_length", "embed_dim", "quick_gelu", "init_logit_scale", "init_logit_bias", "projected"),
    "nonscalar_logit_scale",
})  # fmt: skip
# Beginnings of names that load, wherever a constructor may have them.
LOADS = ("checkpoint", "pretrained_cfg", "pretrained_path", "pretrained_file", "cache_dir", "weights_only", "load_")


def described_arguments(description: Mapping, what: str, own: bool, checkpoint: str | Path | None = None) -> dict:
    """Arguments of `create_backbone` or `create_clip` for the backbone of a description.

    Args:
        description: what `save` or `save_learner` wrote.
        what: what is to be created, in words.
        own: it is of a run of this user; its arguments are taken as they are. Any other may name no file or folder of
            this machine, wherever it lies: a folder that was unpacked is no more to be trusted than a download.
        checkpoint: the file of weights that the user names, in the place of those described.

    Raises:
        ConfigurationError: the backbone was not created by visionpeft, or the description asks for something that it
            may not choose.
        StorageError: the description is not one that `save` writes.
    """
    source = description["backbone"]["source"]
    yourself = f"give {what} yourself with model="
    if "kwargs" not in source:
        raise ConfigurationError(
            f"it is not recorded how {source['name']} was made, as visionpeft.create_backbone or create_clip would; "
            f"{yourself}"
        )
    types = {"name": str, "pretrained": bool, "checkpoint": str | None, "kwargs": dict}
    if any(not isinstance(source.get(key), kind) for key, kind in types.items()):
        raise StorageError(
            f"the description of the backbone lacks one of {', '.join(types)}, or has it with another type"
        )
    name, kwargs, recorded = source["name"], source["kwargs"], source["checkpoint"]
    if not own:
        if name.startswith("local-dir:"):
            raise ConfigurationError(
                f"the description names {name.removeprefix('local-dir:')!r}, a folder on the machine it was trained "
                f"on, and no path is taken from a description; {yourself}"
            )
        if recorded is not None and checkpoint is None:
            file = file_name_of(recorded)
            raise ConfigurationError(
                f"the description names {recorded!r}, a file on the machine it was trained on, and no path is taken "
                f"from a description; give the weights with checkpoint=, as checkpoint={file!r}, or {yourself}"
            )
        allowed = _allowed(name)
        if refused := [key for key, value in kwargs.items() if key not in allowed or not _is_plain(value)]:
            raise ConfigurationError(
                f"the description sets {refused[0]}={kwargs[refused[0]]!r}, which is not an argument that says what "
                f"the model is; {yourself}"
            )
    chosen = recorded if checkpoint is None else checkpoint  # also an empty one, so that it is never the recorded one
    return {"name": name, "pretrained": source["pretrained"], "checkpoint": chosen} | kwargs


def file_name_of(recorded: str | None) -> str | None:
    """The file of a recorded path alone: where it lay is nobody's business but that of who trained."""
    return None if recorded is None else PureWindowsPath(recorded).name  # which knows the separators of all systems


def without_folders(description: Mapping) -> dict:
    """A description for others: of the weights' file, or of a folder given as `local-dir:`, nothing but the name."""
    source = dict(description["backbone"]["source"])
    if source.get("checkpoint") is not None:
        source["checkpoint"] = file_name_of(source["checkpoint"])
    if source["name"].startswith("local-dir:"):
        source["name"] = f"local-dir:{file_name_of(source['name'].removeprefix('local-dir:'))}"
    return {**description, "backbone": {**description["backbone"], "source": source}}


def _allowed(name: str) -> frozenset[str]:
    """Arguments of the constructors that an architecture's file has, without those that load."""
    if name.startswith("open_clip/"):
        import open_clip  # takes seconds, and only its own models need it

        return OPEN_CLIP & {
            *inspect.signature(open_clip.create_model).parameters,
            *_parameters(open_clip.CLIP),
            "projected",
        }
    architecture = name.rpartition("/")[2].partition(".")[0]
    if not timm.is_model(architecture):  # nano_vit, and models of the Hub, whose architecture is not known yet
        architecture = "vit_base_patch16_224"
    module = sys.modules[timm.model_entrypoint(architecture).__module__]
    classes = [value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, nn.Module)]
    names = set().union(*(_parameters(cls) for cls in classes if cls.__module__ == module.__name__))
    return frozenset(key for key in names - {"self", "args", "kwargs"} if not key.startswith(LOADS))


def _parameters(cls: type) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters)


def _is_plain(value: object) -> bool:
    """A number, a flag, a word without a path in it, or a list of such."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return not any(mark in value for mark in ("/", "\\", ":"))
    return value is None or isinstance(value, bool | int | float)
