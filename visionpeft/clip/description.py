"""What stands in a saved learner, checked."""

from pathlib import Path
from typing import get_args

import torch

from visionpeft.adapters.described_tensors import check_entries, read_described
from visionpeft.clip.class_loss import ClassLoss
from visionpeft.errors import StorageError

FORMAT = 1
STEM = "learner"
LOSSES = get_args(ClassLoss)


def read_learner(folder: str | Path) -> dict:
    """What `save_learner` wrote about a learner, checked; no CLIP is needed.

    Args:
        folder: the folder.

    Raises:
        StorageError: the folder holds no intact learner.
    """
    return read_saved(folder)[0]


def read_saved(folder: str | Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Description and tensors of a saved learner.

    Raises:
        StorageError: the folder holds no intact learner.
    """
    return read_described(folder, STEM, _check_description)


def _check_description(description: object, path: Path) -> None:
    types = {"learner": dict, "templates": list, "class_names": list, "allow_duplicates": bool}
    types |= {"backbone": dict, "adapters": list}
    check_entries(description, path, FORMAT, types)
    learner, backbone = description["learner"], description["backbone"]
    sound = isinstance(learner.get("class"), str) and isinstance(learner.get("options"), dict)
    texts = [text for key in ("class_names", "templates", "adapters") for text in description[key]]
    sound &= all(isinstance(text, str) for text in texts)
    sound &= description.get("loss", "cross_entropy") in LOSSES  # older versions do not write it
    sound &= all(isinstance(backbone.get(k), str) for k in ("class", "architecture", "fingerprint"))
    if not sound:
        raise StorageError(f"the description in {path} is not what save_learner writes")
