"""What a finished run has trained, ready to classify images or videos."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from visionpeft.adapters.storage import load, read_metadata
from visionpeft.backbones.preprocessing import Preprocessing, Resize
from visionpeft.clip.description import read_learner
from visionpeft.errors import ConfigurationError, StorageError
from visionpeft.models.create import create_backbone
from visionpeft.models.video_classifier import VideoClassifier
from visionpeft.models.video_sampling import FrameSampling
from visionpeft.sharing.described_backbone import described_arguments
from visionpeft.sharing.run_directory import RunDirectory


@dataclass
class TrainedModel:
    """A model and how it is used.

    Args:
        model: images (batch, 3, height, width), or clips (batch, 3, frames, height, width) -> logits (batch, classes).
        class_names: names of the classes, in the order of the logits; None if they were not recorded.
        preprocessing: how the model wants its images, None if that was not recorded.
        resize: of images, as in training; None for videos.
        sampling: which frames make a clip, as in the test of the run; None for images.
        crops: crops of each clip in that test.
        resizing: of frames, as in training.
    """

    model: nn.Module
    class_names: list[str] | None
    preprocessing: Preprocessing | None = None
    resize: Resize | None = None
    sampling: FrameSampling | None = None
    crops: int = 1
    resizing: Literal["pillow", "tensor"] = "pillow"


def open_run(run: RunDirectory, class_names: Sequence[str] | None = None) -> TrainedModel:
    """The model of a finished run.

    Args:
        run: its directory.
        class_names: classes to tell apart in place of those it was trained for.

    Raises:
        StorageError: the run has not finished, or its files are damaged or belong to another backbone.
        ConfigurationError: what was trained belongs to its own classes, or the new names cannot be used.
    """
    # A backbone without pretrained weights is drawn again.
    torch.manual_seed(run.read_results()["seed"])
    return open_saved(run.learner if run.learner.is_dir() else run.adapter, class_names, own=True)


def open_saved(
    folder: Path,
    class_names: Sequence[str] | None = None,
    model: nn.Module | None = None,
    tokenizer: Callable | None = None,
    *,
    own: bool = False,
    downloaded: bool = False,
) -> TrainedModel:
    """The model of a folder that `save` or `save_learner` wrote.

    Args:
        folder: the folder.
        class_names: classes to tell apart in place of those it was trained for.
        model: the backbone, or CLIP; by default it is made as the description says.
        tokenizer: that of the CLIP, if `model` is one.
        own: the folder is of a run of this user, whose description is taken as it is.
        downloaded: the folder comes from the Hub, and its description may name no path.

    Raises:
        StorageError: the files are damaged or belong to another backbone.
        ConfigurationError: what was trained belongs to its own classes, or the backbone cannot be made.
    """
    description = read_description(folder)
    if stem_of(folder) == "learner":
        # imported here, because OpenCLIP takes seconds and an adapter of a timm model does not need it
        from visionpeft.clip.storage import load_learner
        from visionpeft.models.create_clip import create_clip

        if model is None:
            model, tokenizer = create_clip(
                **described_arguments(description, "the CLIP and its tokenizer", own, downloaded)
            )
        elif tokenizer is None:
            raise ConfigurationError(f"{folder} holds a learner; give the tokenizer of its CLIP, too")
        model = load_learner(folder, model, tokenizer, class_names)
        names = model.class_names
    else:
        names = description["class_names"]
        if class_names is not None:
            raise ConfigurationError(
                f"{folder} holds a head for its own {len(names or ())} classes and knows no others; "
                "a learner on a CLIP, such as that of fewshot_coop.yaml, takes any class names"
            )
        if model is None:
            model = _classifier(description, described_arguments(description, "the model", own, downloaded))
        load(model, folder)
    trained = TrainedModel(model.eval(), names)
    if preprocessing := description["preprocessing"]:
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in preprocessing.items()}
        trained.preprocessing = Preprocessing(**values)
    data = description["metadata"].get("data", {})
    trained.resize = data.get("resize")
    if "sampling" in data:
        trained.sampling, trained.crops = FrameSampling(**data["sampling"]), data["test_crops"]
        trained.resizing = data.get("resizing", "pillow")
    return trained


def read_description(folder: Path) -> dict:
    """What `save` or `save_learner` wrote about an adapter or a learner, checked."""
    return read_learner(folder) if stem_of(folder) == "learner" else read_metadata(folder)


def stem_of(folder: Path) -> str:
    """What a folder holds: "learner" or "adapter".

    Raises:
        StorageError: neither.
    """
    for stem in ("learner", "adapter"):
        if (folder / f"{stem}.safetensors").is_file():
            return stem
    raise StorageError(
        f"{folder} holds neither adapter.safetensors nor learner.safetensors; give a folder that save or save_learner "
        "wrote"
    )


def _classifier(description: dict, arguments: dict) -> nn.Module:
    """The model that an adapter belongs to, made with the arguments of its backbone."""
    data = description["metadata"].get("data", {})
    names = description["class_names"]
    if "sampling" not in data:
        return create_backbone(**arguments, num_classes=len(names or ()))
    images = create_backbone(**arguments)
    model = VideoClassifier(images, num_frames=data["sampling"]["num_frames"], num_classes=len(names))
    model.set_num_frames(model.num_frames, interpolate=True)  # whether it may be, the training has decided
    return model
