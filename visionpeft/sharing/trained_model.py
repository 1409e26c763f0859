"""What a finished run has trained, ready to classify images or videos."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from visionpeft.adapters.head_layout import dense_head_from_layout
from visionpeft.adapters.storage import load, read_metadata
from visionpeft.backbones.preprocessing import Preprocessing, Resize
from visionpeft.clip.description import read_learner
from visionpeft.errors import ConfigurationError, StorageError
from visionpeft.heads import DetectionHead
from visionpeft.models.create import create_backbone
from visionpeft.models.dense_predictor import DensePredictor
from visionpeft.models.object_detector import ObjectDetector
from visionpeft.models.video_classifier import VideoClassifier
from visionpeft.models.video_sampling import FrameSampling
from visionpeft.sharing.described_backbone import described_arguments
from visionpeft.sharing.one_task import one_task, treatment
from visionpeft.sharing.run_directory import RunDirectory

KINDS = ("classes", "several", "number", "masks", "objects")


@dataclass
class TrainedModel:
    """A model and how it is used.

    Args:
        model: images (batch, 3, height, width), or clips (batch, 3, frames, height, width) -> logits (batch, outputs);
            `answers` says what they mean.
        class_names: names of the classes, in the order of the logits; None if they were not recorded, none of numbers.
        preprocessing: how the model wants its images, None if that was not recorded.
        resize: of images, as in training; None for videos.
        sampling: which frames make a clip, as in the test of the run; None for images.
        crops: crops of each clip in that test.
        resizing: of frames, as in training.
        labels: what is told of an image: one of "classes", "several" of them, a "number", "masks" or
            "objects".
        size: pixels of the shorter side of images, for masks and objects.
        window: height and width of windows that slide over images, for masks; None for the whole at once.
        stride: pixels from one window to the next.
        palette: a colour for each class of masks or objects.
        pairs: whether each class is judged by itself, as a learner with loss "sigmoid" does.
        category_ids: the number of each class in files of results, for objects.
        mean: of numbers, that of the training labels.
        deviation: their standard deviation.
    """

    model: nn.Module
    class_names: list[str] | None
    preprocessing: Preprocessing | None = None
    resize: Resize | None = None
    sampling: FrameSampling | None = None
    crops: int = 1
    resizing: Literal["pillow", "tensor"] = "pillow"
    labels: str = "classes"
    pairs: bool = False
    mean: float | None = None
    deviation: float | None = None
    size: int | None = None
    window: int | None = None
    stride: int | None = None
    palette: list[list[int]] | None = None
    category_ids: list[int] | None = None

    @property
    def judges_each(self) -> bool:
        """Whether one class alone means something, as each is judged by itself."""
        return self.pairs and self.labels == "classes"

    def answers(self, logits: torch.Tensor) -> torch.Tensor:
        """What the outputs (batch, outputs) say of each image; of `pairs`, probabilities that do not sum to 1.

        Returns:
            Class probabilities (batch, classes), which sum to 1 unless they are of `pairs`; of several labels the
            probability of each (batch, labels); the numbers (batch,), in the unit of the training labels; or of logits
            (batch, classes, height, width) the class indices (batch, height, width). What a detector gives is its
            answer already.
        """
        if self.labels == "masks":
            return self.model.decide(logits)
        if self.labels == "objects":
            return logits
        logits = logits.float()
        if self.labels == "number":
            return logits.squeeze(-1) * self.deviation + self.mean
        return logits.sigmoid() if self.labels == "several" or self.pairs else logits.softmax(dim=-1)


def open_run(run: RunDirectory, class_names: Sequence[str] | None = None, task: str | None = None) -> TrainedModel:
    """The model of a finished run.

    Args:
        run: its directory.
        class_names: classes to tell apart in place of those it was trained for.
        task: of the images, where it was trained on several.

    Raises:
        StorageError: the run has not finished, or its files are damaged or belong to another backbone.
        ConfigurationError: what was trained belongs to its own classes, or the new names cannot be used.
    """
    # A backbone without pretrained weights is drawn again.
    torch.manual_seed(run.read_results()["seed"])
    return open_saved(run.learner if run.learner.is_dir() else run.adapter, class_names, own=True, task=task)


def open_saved(
    folder: Path,
    class_names: Sequence[str] | None = None,
    model: nn.Module | None = None,
    tokenizer: Callable | None = None,
    *,
    own: bool = False,
    checkpoint: str | Path | None = None,
    task: str | None = None,
) -> TrainedModel:
    """The model of a folder that `save` or `save_learner` wrote.

    Args:
        folder: the folder.
        class_names: classes to tell apart in place of those it was trained for.
        model: the backbone, or CLIP; by default it is made as the description says.
        tokenizer: that of the CLIP, if `model` is one.
        own: the folder is of a run of this user, whose description is taken as it is.
        checkpoint: file with the weights of the backbone, in the place of those that are described.
        task: of the images, where it was trained on several.

    Raises:
        StorageError: the files are damaged or belong to another backbone.
        ConfigurationError: what was trained belongs to its own classes, or the backbone cannot be made.
    """
    if checkpoint is not None and model is not None:
        raise ConfigurationError("checkpoint= is for a backbone that is made here; leave it out where model= is given")
    description = read_description(folder)
    if stem_of(folder) == "learner":
        # imported here, because OpenCLIP takes seconds and an adapter of a timm model does not need it
        from visionpeft.clip.storage import load_learner
        from visionpeft.models.create_clip import create_clip

        if model is None:
            model, tokenizer = create_clip(
                **described_arguments(description, "the CLIP and its tokenizer", own, checkpoint)
            )
        elif tokenizer is None:
            raise ConfigurationError(f"{folder} holds a learner; give the tokenizer of its CLIP, too")
        model = load_learner(folder, model, tokenizer, class_names)
        if (dense := description["metadata"].get("open_vocabulary")) is not None:
            model = _for_pixels(model, dense, folder, renamed=class_names is not None)
        names = model.class_names
    else:
        names = description["class_names"]
        if class_names is not None:
            raise ConfigurationError(
                f"{folder} holds a head for its own {len(names or ())} classes and knows no others; "
                "a learner on a CLIP, such as that of fewshot_coop.yaml, takes any class names"
            )
        if model is None:
            model = described_classifier(description, folder, own, checkpoint)
        load(model, folder)
    trained = as_described(model, names, description, folder, task)
    if class_names is not None:
        trained.palette = None  # that of the other classes
    return trained


def _for_pixels(learner: nn.Module, dense: Mapping, folder: Path, renamed: bool) -> nn.Module:
    """A learner as it classifies pixels; classes that were renamed are found by these names, without a background.

    Raises:
        StorageError: the description is not that of an `OpenVocabulary`.
    """
    from visionpeft.models.open_vocabulary import OpenVocabulary  # with OpenCLIP, which is there with a learner

    try:
        options = {**dense, "classes": None, "threshold": 0.0} if renamed else dense
        return OpenVocabulary(learner, **options)
    except (TypeError, AttributeError):
        raise StorageError(f"{folder} says it classifies pixels, but not in a way that this version knows") from None


def as_described(
    model: nn.Module, names: list[str] | None, description: Mapping, folder: Path | str, task: str | None = None
) -> TrainedModel:
    """A model, and how it is used by what `save` or `save_learner` wrote about it.

    Args:
        model: the model, with what was trained; put into evaluation mode.
        names: names of its classes.
        description: what was written.
        folder: where, for an error.
        task: of the images, where it was trained on several.

    Raises:
        ConfigurationError: it was trained on several tasks, and `task` is none of them.
        StorageError: it predicts numbers, and their mean or deviation is missing.
    """
    objective = learnt_objective(description, folder)
    model, names = one_task(model, names, objective, task, folder)
    trained = TrainedModel(model.eval(), names)
    if preprocessing := description["preprocessing"]:
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in preprocessing.items()}
        trained.preprocessing = Preprocessing(**values)
    trained.labels, trained.pairs = objective["labels"], description.get("loss") == "sigmoid"
    trained.mean, trained.deviation = objective.get("mean"), objective.get("deviation")
    data = description["metadata"].get("data", {})
    if trained.labels == "masks":
        trained.window, trained.stride = objective.get("window"), objective.get("stride")
        trained.size, trained.palette = data.get("test_size") or data.get("size"), data.get("palette")
    if trained.labels == "objects":
        trained.size, trained.palette, trained.category_ids = (
            data.get(name) for name in ("size", "palette", "category_ids")
        )
    if task is not None:  # whose images were treated in their own way
        data, own = treatment(data, task, folder)
        trained.preprocessing = replace(trained.preprocessing, **own)
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


def learnt_objective(description: Mapping, folder: Path | str) -> dict:
    """What an adapter has learnt of an image, as a task has recorded it: at least its "labels".

    Adapters of earlier versions, learners, and adapters saved without a task have learnt classes; what else their
    metadata call objective is not ours.

    Raises:
        StorageError: it predicts numbers, and their mean or deviation is missing.
    """
    objective = description["metadata"].get("objective")
    if not isinstance(objective, Mapping) or objective.get("labels") not in KINDS:
        return {"labels": "classes"}
    if objective["labels"] == "number":
        for name in ("mean", "deviation"):
            if not isinstance(objective.get(name), int | float):
                raise StorageError(f"{folder} predicts numbers, but its description does not say their {name}")
    return dict(objective)


def described_classifier(
    description: Mapping, folder: Path | str, own: bool = False, checkpoint: str | Path | None = None
) -> nn.Module:
    """The model that an adapter belongs to, without the adapter.

    Args:
        description: what `save` wrote.
        folder: where, for an error.
        own: as for `open_saved`.
        checkpoint: as for `open_saved`.

    Raises:
        ConfigurationError: the backbone cannot be made.
        StorageError: the description is not one that `save` writes.
    """
    arguments = described_arguments(description, "the model", own, checkpoint)
    data = description["metadata"].get("data", {})
    names = description["class_names"]
    if (layout := description["heads"].get("head", {})) and "fields" in layout:
        images = create_backbone(**arguments)
        head = dense_head_from_layout(layout)
        kind = ObjectDetector if isinstance(head, DetectionHead) else DensePredictor
        return kind(images, head, layout["arguments"]["num_classes"])
    if "sampling" not in data:
        # With the outputs of the training, or a backbone without pretrained weights would be drawn differently.
        number = learnt_objective(description, folder)["labels"] == "number"
        return create_backbone(**arguments, num_classes=1 if number else len(names or ()))
    images = create_backbone(**arguments)
    model = VideoClassifier(images, num_frames=data["sampling"]["num_frames"], num_classes=len(names))
    model.set_num_frames(model.num_frames, interpolate=True)  # whether it may be, the training has decided
    return model
