"""The prompt template that belongs to each data set."""

from visionpeft.data.few_shot.definitions import few_shot_datasets, find_few_shot
from visionpeft.errors import ConfigurationError

STYLES = ("zero_shot", "prograd", "kgcoop", "tcp", "tip_adapter", "task_res", "tda")


def dataset_template(dataset: str, style: str = "zero_shot") -> str:
    """The template of a data set of the few-shot benchmark, by key or alias.

    Args:
        dataset: such as "dtd"; upper and lower case alike.
        style: "zero_shot": as CoOp and CLIP-Adapter use it. Of those of other learners, each the zero-shot template
            where nothing else is said: "prograd", also ProVP's: with the class name last; "kgcoop": another for DTD;
            "tcp": others for DTD, Aircraft and Food101; "tip_adapter", also LP++'s, and "task_res", also CLAP's:
            several for ImageNet; "tda": several for ImageNet and its variants, Caltech101, Cars and SUN397.

    Returns:
        The template, or the name of a set of them.

    Raises:
        ConfigurationError: an unknown data set or style.
    """
    key = find_few_shot(dataset)
    if style not in STYLES:
        raise ConfigurationError(f"unknown style {style!r} of template: choose one of {', '.join(STYLES)}")
    own = few_shot_datasets()[key]["templates"]
    return own.get(style, own["zero_shot"])
