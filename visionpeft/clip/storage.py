"""Save what a learner has learnt, a few kilobytes, and load it on its CLIP: `learner.safetensors`, `learner.json`."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch.nn as nn

from visionpeft.adapters.described_tensors import write_described
from visionpeft.adapters.description import described
from visionpeft.adapters.storage import backbone_record, package_versions
from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.clip import learners as learner_classes
from visionpeft.clip.building import left_as_it_was
from visionpeft.clip.description import FORMAT, STEM, read_saved
from visionpeft.clip.learner import Learner
from visionpeft.clip.model import check_same_clip
from visionpeft.errors import StorageError, near_names
from visionpeft.extensions import classes_by_name


def save_learner(
    learner: Learner,
    folder: str | Path,
    *,
    preprocessing: Preprocessing | None = None,
    metadata: Mapping | None = None,
) -> None:
    """Write what was learnt, with everything needed to build the learner again except the CLIP.

    Args:
        learner: the learner.
        folder: where to write `learner.safetensors` and `learner.json`.
        preprocessing: how images were prepared.
        metadata: anything else that JSON can hold, such as data set and result.
    """
    description = {
        "format": FORMAT,
        "learner": {"class": type(learner).__name__, "options": learner.options},
        "templates": list(learner.templates),
        "class_names": learner.class_names,
        "adapters": [name for name in learner.acting if name != learner.adapter_name],
        "allow_duplicates": learner.allow_duplicates,
        "loss": learner.loss_name,
        **({"published": learner.taken()} if learner.taken() else {}),
        "backbone": backbone_record(learner.clip),
        **described(preprocessing, metadata),
        "versions": package_versions(),
    }
    write_described(folder, STEM, learner.trained_state(), description)


def load_learner(
    folder: str | Path,
    clip: nn.Module,
    tokenizer: Callable,
    class_names: Sequence[str] | None = None,
    *,
    check_fingerprint: bool = True,
) -> Learner:
    """Build the learner of a folder on the CLIP it was trained on.

    Args:
        folder: what `save_learner` wrote.
        clip: the CLIP model.
        tokenizer: its tokenizer.
        class_names: other classes than those it was trained for.
        check_fingerprint: refuse a CLIP whose weights differ from those the learner was trained on.

    Raises:
        StorageError: the folder is damaged or edited, or belongs to another CLIP.
        ConfigurationError: what was learnt belongs to its own classes, or the new names cannot be used.
    """
    description, tensors = read_saved(folder)
    what = f"the learner in {folder}"
    check_same_clip(clip, description, what, check_fingerprint)
    entry = description["learner"]
    own = [getattr(learner_classes, name) for name in learner_classes.__all__ if name != "Learner"]
    classes = classes_by_name(Learner, own)
    if entry["class"] not in classes:
        known = near_names(entry["class"], classes)
        raise StorageError(
            f"{what} is of a class {entry['class']!r} this version does not have{known}; a learner of your own must be "
            "imported first"
        )
    cls = classes[entry["class"]]
    duplicates = description["allow_duplicates"]
    with left_as_it_was(clip):
        try:
            with warnings.catch_warnings():
                if class_names is not None:  # remarks about the old names would be of no use
                    warnings.simplefilter("ignore")
                options = entry["options"]
                learner = cls(clip, tokenizer, description["class_names"], **options, allow_duplicates=duplicates)
        except TypeError as error:
            raise StorageError(f"the saved options of {entry['class']} do not fit this version: {error}") from None
        if description["templates"]:  # perhaps those of the data set it was trained on
            learner.set_template(description["templates"])
        learner.set_published(description.get("published", {}))
        learner.set_loss(description.get("loss", "cross_entropy"))
        learner.load_trained_state(tensors, what)
        if class_names is not None:
            learner.set_class_names(class_names)
    return learner.eval()
