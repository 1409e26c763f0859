"""What `datasets/few_shot.json` and `datasets/class_names` say about the sets of the few-shot benchmark."""

import json
from collections.abc import Mapping, Sequence

from visionpeft.data.aliases import choose
from visionpeft.files import shipped


def few_shot_datasets() -> dict[str, dict]:
    """Definition of each data set of the few-shot benchmark: folders, layout, sizes, templates, where it comes from."""
    return json.loads((shipped("datasets") / "few_shot.json").read_text(encoding="utf-8"))["datasets"]


def find_few_shot(name: str, others: Mapping[str, Sequence[str]] | None = None) -> str:
    """The key of the data set that a key, title or alias means, upper and lower case alike.

    Args:
        name: what is looked for.
        others: further keys that are allowed, with their aliases.

    Raises:
        ConfigurationError: there is none; names the nearest ones.
    """
    names = {key: [entry["title"], *entry["aliases"]] for key, entry in few_shot_datasets().items()}
    return choose(name, {**names, **(others or {})}, "few-shot data set")


def is_embedded(name: str) -> bool:
    """Whether the images of a data set, by key, title or alias, are in the package, so that it is read in no root."""
    names = {
        name.lower()
        for key, entry in few_shot_datasets().items()
        if entry.get("embedded")
        for name in (key, entry["title"], *entry["aliases"])
    }
    return name.lower() in names


def few_shot_class_names(name: str) -> list[str] | dict[str, str]:
    """Shipped class names in the order of the labels: a list, or for ImageNet and its subsets {WordNet id: name}."""
    return json.loads((shipped("datasets") / "class_names" / f"{name}.json").read_text(encoding="utf-8"))
