"""Splits of the few-shot benchmark built from what is on disk, for people who do not have the published files.

By the rules of CoOp (Zhou et al. 2022, arXiv 2109.01134): 50, 20 and 30 % of the images of each class where it made
the split itself, and 20 % of each class of the official training images held out where there is an official test
split. The images drawn are others than CoOp's, so such a split is labelled as our own.
"""

import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from visionpeft.data.annotations import read_text
from visionpeft.data.few_shot.definitions import few_shot_class_names
from visionpeft.data.few_shot.imagenet_folders import image_names
from visionpeft.data.few_shot.place import Place, images_folder
from visionpeft.data.few_shot.split_zhou import own_split_file
from visionpeft.errors import ConfigurationError, DataError

Item = tuple[str, int, str]  # path in the image folder, label, class name
HELD_OUT = 0.2


def build_split(key: str, definition: dict, place: Place, seed: int) -> tuple[Path, dict[str, object]]:
    """The file for a split of our own, and its content in the layout of `split_zhou_*.json` with an entry "about".

    Args:
        key: of the data set.
        definition: its entry of `few_shot_datasets()`.
        place: where it is.
        seed: of the division.

    Raises:
        ConfigurationError: the data set has an official split.
        DataError: images or annotations are missing, or a class has too few images.
    """
    recipe = definition.get("own_split")
    if recipe is None:
        raise ConfigurationError(f"{definition['title']} has an official split; there is nothing to build")
    folder = _folder(definition, place)
    images = images_folder(definition, place, folder)
    generator = random.Random(seed)
    if recipe["labels"] in ("class_folders", "flowers"):
        items = _class_folders(images, recipe) if recipe["labels"] == "class_folders" else _flowers(folder)
        splits = _divided(items, generator)
        rule = "50, 20 and 30 % of each class"
    else:
        trained, tested = {"pets": _pets, "cars": _cars, "sun": _sun, "ucf": _ucf}[recipe["labels"]](folder)
        splits = _held_out(trained, generator) | {"test": tested}
        rule = "20 % of each class of the official training images held out; official test images"
    for items in splits.values():
        for path, _, _ in items:
            if not (images / path).is_file():
                raise DataError(f"image {images / path} is listed by the annotations and does not exist")
    if len({label for items in splits.values() for _, label, _ in items}) < 2:
        raise DataError(
            f"{images} holds fewer than two classes of images; expected the {definition['classes']} published"
        )
    about = {"made_by": "visionpeft", "dataset": key, "seed": seed, "rule": rule}
    return folder / own_split_file(definition), {**splits, "about": about}


def _folder(definition: dict, place: Place) -> Path:
    candidates = place.folders(definition)
    for folder in candidates:
        if any(images.is_dir() for images in place.images(definition, folder)):
            return folder
    raise DataError(
        f"{definition['title']} is not under {place.root}: expected {place.images(definition, candidates[0])[0]}; it "
        f"comes from {definition['source']}"
    )


def _class_folders(images: Path, recipe: dict) -> list[Item]:
    """Images of each folder; labels in the order of the folders' names."""
    ignored, renamed = recipe.get("ignored", []), recipe.get("renamed", {})
    folders = sorted(
        path.name for path in images.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in ignored
    )
    return [
        (f"{folder}/{name}", label, renamed.get(folder, folder))
        for label, folder in enumerate(folders)
        for name in image_names(images / folder)
    ]


def _pets(folder: Path) -> tuple[list[Item], list[Item]]:
    """`annotations/{trainval,test}.txt`: image, class from 1, species, breed; image names begin with the breed."""

    def items(split: str) -> list[Item]:
        lines = [line.split() for line in _lines(folder / "annotations" / f"{split}.txt") if line[0] != "#"]
        return [(f"{image}.jpg", int(label) - 1, image.rpartition("_")[0].lower()) for image, label, *_ in lines]

    return items("trainval"), items("test")


def _sun(folder: Path) -> tuple[list[Item], list[Item]]:
    """`ClassName.txt`, `Training_01.txt`, `Testing_01.txt`: class folders such as /a/apse/indoor."""
    labels = {name: label for label, name in enumerate(_lines(folder / "ClassName.txt"))}

    def items(file: str) -> list[Item]:
        found = []
        for line in _lines(folder / file):
            name = line.rpartition("/")[0]
            if name not in labels:
                raise DataError(f"{folder / file}: class {name} is not in {folder / 'ClassName.txt'}")
            found.append((line.lstrip("/"), labels[name], " ".join(name.split("/")[2:][::-1])))
        return found

    return items("Training_01.txt"), items("Testing_01.txt")


def _ucf(folder: Path) -> tuple[list[Item], list[Item]]:
    """`ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt`; middle frames lie in folders such as Apply_Lipstick."""
    lists = folder / "ucfTrainTestlist"
    labels = {name: int(number) - 1 for number, name in (line.split() for line in _lines(lists / "classInd.txt"))}

    def items(file: str) -> list[Item]:
        found = []
        for line in _lines(lists / file):
            action, _, video = line.split()[0].partition("/")
            if action not in labels:
                raise DataError(f"{lists / file}: class {action} is not in {lists / 'classInd.txt'}")
            name = "_".join(re.findall("[A-Z][^A-Z]*", action))
            found.append((f"{name}/{Path(video).stem}.jpg", labels[action], name))
        return found

    return items("trainlist01.txt"), items("testlist01.txt")


def _flowers(folder: Path) -> list[Item]:
    """`imagelabels.mat`: the class from 1 of image_00001.jpg, image_00002.jpg, ..."""
    names = few_shot_class_names("oxford_flowers")
    labels = [int(label) - 1 for label in _matlab(folder / "imagelabels.mat")["labels"].ravel()]
    return [(f"image_{number:05d}.jpg", label, names[label]) for number, label in enumerate(labels, start=1)]


def _cars(folder: Path) -> tuple[list[Item], list[Item]]:
    """`devkit/cars_train_annos.mat` and `cars_test_annos_withlabels.mat`: file name and class from 1."""
    names = few_shot_class_names("stanford_cars")

    def items(images: str, file: Path) -> list[Item]:
        entries = _matlab(file)["annotations"].ravel()
        pairs = [(str(entry["fname"].item()), int(entry["class"].item()) - 1) for entry in entries]
        return [(f"{images}/{name}", label, names[label]) for name, label in pairs]

    return (
        items("cars_train", folder / "devkit" / "cars_train_annos.mat"),
        items("cars_test", folder / "cars_test_annos_withlabels.mat"),
    )


def _matlab(file: Path) -> dict:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(f"reading {file} needs SciPy; install it with pip install scipy") from error
    if not file.is_file():
        raise DataError(f"annotation file {file} does not exist")
    return loadmat(file)


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def _groups(items: Iterable[Item]) -> list[list[Item]]:
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item[1], []).append(item)
    return [groups[label] for label in sorted(groups)]


def _divided(items: Sequence[Item], generator: random.Random) -> dict[str, list[Item]]:
    splits: dict[str, list[Item]] = {"train": [], "val": [], "test": []}
    for members in _groups(items):
        members = generator.sample(members, len(members))
        train, val = round(0.5 * len(members)), round(0.2 * len(members))
        if not 0 < val < len(members) - train:
            raise DataError(f"class '{members[0][2]}' has {len(members)} images, too few for train, val and test")
        splits["train"] += members[:train]
        splits["val"] += members[train : train + val]
        splits["test"] += members[train + val :]
    return splits


def _held_out(items: Sequence[Item], generator: random.Random) -> dict[str, list[Item]]:
    splits: dict[str, list[Item]] = {"train": [], "val": []}
    for members in _groups(items):
        members = generator.sample(members, len(members))
        val = round(HELD_OUT * len(members))
        if not 0 < val < len(members):
            raise DataError(f"class '{members[0][2]}' has {len(members)} training images, too few to hold some out")
        splits["val"] += members[:val]
        splits["train"] += members[val:]
    return splits
