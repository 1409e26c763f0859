"""What a finished run has trained, ready to classify images or videos."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from visionpeft.backbones.create import create_backbone
from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.clip.create import create_clip
from visionpeft.clip.description import read_learner
from visionpeft.clip.storage import load_learner
from visionpeft.data import FrameSampling
from visionpeft.data.transforms import Resize
from visionpeft.errors import ConfigurationError
from visionpeft.run_directory import RunDirectory
from visionpeft.storage import load, read_metadata
from visionpeft.video import VideoClassifier


@dataclass
class TrainedModel:
    """A model and how it is used.

    Args:
        model: images (batch, 3, height, width), or clips (batch, 3, frames, height, width) -> logits (batch, classes).
        class_names: names of the classes, in the order of the logits.
        preprocessing: how the model wants its images.
        resize: of images, as in training; None for videos.
        sampling: which frames make a clip, as in the test of the run; None for images.
        crops: crops of each clip in that test.
    """

    model: nn.Module
    class_names: list[str]
    preprocessing: Preprocessing
    resize: Resize | None = None
    sampling: FrameSampling | None = None
    crops: int = 1


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
    if run.learner.is_dir():
        description = read_learner(run.learner)
        clip, tokenizer = create_clip(**_arguments(description))
        model = load_learner(run.learner, clip, tokenizer, class_names)
        names = model.class_names
    else:
        description = read_metadata(run.adapter)
        names = description["class_names"]
        if class_names is not None:
            raise ConfigurationError(
                f"the run in {run.path} has trained a head for its own {len(names)} classes and knows no others; "
                "a learner on a CLIP, such as that of fewshot_coop.yaml, takes any class names"
            )
        model = _classifier(description)
        load(model, run.adapter)
    preprocessing = {
        key: tuple(value) if isinstance(value, list) else value for key, value in description["preprocessing"].items()
    }
    data = description["metadata"]["data"]
    trained = TrainedModel(model.eval(), names, Preprocessing(**preprocessing), data.get("resize"))
    if "sampling" in data:
        trained.sampling, trained.crops = FrameSampling(**data["sampling"]), data["test_crops"]
    return trained


def _classifier(description: dict) -> nn.Module:
    """The model that an adapter belongs to."""
    names, data = description["class_names"], description["metadata"]["data"]
    if "sampling" not in data:
        return create_backbone(**_arguments(description), num_classes=len(names))
    images = create_backbone(**_arguments(description))
    model = VideoClassifier(images, num_frames=data["sampling"]["num_frames"], num_classes=len(names))
    model.set_num_frames(model.num_frames, interpolate=True)  # whether it may be, the training has decided
    return model


def _arguments(description: dict) -> dict:
    """Arguments with which the backbone was created."""
    source = description["backbone"]["source"]
    return {key: source[key] for key in ("name", "pretrained", "checkpoint")} | source["kwargs"]
