"""What is said about a saved adapter besides its tensors: checked before it is written, and when it is read."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from visionpeft.adapters.described_tensors import check_entries
from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.errors import ConfigurationError, StorageError

FORMAT = 1


def names_of(class_names: Sequence[str]) -> list[str]:
    """Names of classes as they are written.

    Raises:
        ConfigurationError: they are one text, or not texts.
    """
    names = list(class_names)
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in names):
        raise ConfigurationError(f"class_names needs a list with a text for each class, not {class_names!r}")
    return names


def described(preprocessing: Preprocessing | None, metadata: Mapping | None) -> dict[str, dict | None]:
    """The entries of a description that say how images were prepared, and what else there is to say.

    Raises:
        ConfigurationError: they are of other types, or could not be read again.
    """
    if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
        raise ConfigurationError(
            "preprocessing needs a Preprocessing, as preprocessing_of(model) in visionpeft.backbones.preprocessing "
            f"gives it, not {preprocessing!r}"
        )
    if metadata is not None and not isinstance(metadata, Mapping):
        raise ConfigurationError(f"metadata needs names with values, as a dict, not {metadata!r}")
    fields = None if preprocessing is None else dataclasses.asdict(preprocessing)
    read = fields and {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    if read is not None and not _is_preprocessing(read):
        raise ConfigurationError(
            f"preprocessing needs two numbers for input_size and three each for mean and std, not {preprocessing!r}"
        )
    return {"preprocessing": fields, "metadata": dict(metadata or {})}


def check_number_of_names(description: Mapping) -> None:
    """Refuse names of another number than the logits of the one head, where the metadata do not say what it learnt.

    Raises:
        ConfigurationError: saying both numbers.
    """
    names, layouts = description["class_names"], [*description["heads"].values()]
    if not names or len(layouts) != 1 or "objective" in description["metadata"]:
        return
    given = layouts[0].get("arguments", {})
    outputs = given.get("num_classes", given.get("out_features"))
    if outputs is not None and outputs != len(names):
        raise ConfigurationError(f"class_names has {len(names)} names, and the head of the adapter {outputs} outputs")


def check_description(description: object, path: Path) -> None:
    """Refuse a description that `save` does not write.

    Raises:
        StorageError: naming what is wrong with it.
    """
    types = {"methods": list, "train": list, "heads": dict, "backbone": dict, "metadata": dict}
    check_entries(description, path, FORMAT, types)
    entries = all(
        isinstance(e, dict) and isinstance(e.get("class"), str) and isinstance(e.get("fields"), dict)
        for e in description["methods"]
    )
    lists = (description["train"], description.get("class_names") or [])
    names = all(isinstance(each, list) and all(isinstance(name, str) for name in each) for each in lists)
    names = names and {"class_names", "preprocessing"} <= description.keys()
    preprocessing = description.get("preprocessing")
    backbone = all(isinstance(description["backbone"].get(k), str) for k in ("class", "architecture", "fingerprint"))
    if not (entries and names and backbone and (preprocessing is None or _is_preprocessing(preprocessing))):
        raise StorageError(f"the description in {path} is not what save writes")


def _is_preprocessing(entry: object) -> bool:
    lengths = {"input_size": 2, "mean": 3, "std": 3}
    if not isinstance(entry, dict) or entry.keys() != {field.name for field in dataclasses.fields(Preprocessing)}:
        return False
    lists = all(isinstance(entry[key], list) and len(entry[key]) == length for key, length in lengths.items())
    numbers = [entry["crop_pct"], *(value for key in lengths for value in entry[key])] if lists else [None]
    return all(isinstance(value, int | float) for value in numbers) and isinstance(entry["interpolation"], str)
