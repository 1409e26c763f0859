"""The prompt template that belongs to each data set."""

from visionpeft.data.few_shot.definitions import few_shot_datasets, find_few_shot
from visionpeft.errors import ConfigurationError


def dataset_template(dataset: str, style: str = "zero_shot") -> str:
    """The template of a data set of the few-shot benchmark, by key or alias.

    Args:
        dataset: such as "dtd"; upper and lower case alike.
        style: "zero_shot": as CoOp, CLIP-Adapter and Tip-Adapter use it; "prograd": with the class name last;
            "kgcoop": the zero-shot template but for DTD.

    Raises:
        ConfigurationError: an unknown data set or style.
    """
    key = find_few_shot(dataset)
    if style not in ("zero_shot", "prograd", "kgcoop"):
        raise ConfigurationError(f"unknown style '{style}' of template: choose zero_shot, prograd or kgcoop")
    own = few_shot_datasets()[key]["templates"]
    return own.get(style, own["zero_shot"])
