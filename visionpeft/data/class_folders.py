"""Images or videos in a folder for each class, with splits in folders of their own or drawn at random."""

from collections.abc import Callable
from pathlib import Path

from visionpeft.data.ordering import permutation
from visionpeft.data.records import Files, ImageSet
from visionpeft.errors import ConfigurationError, DataError

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}

Find = Callable[[Path], list[Path]]


def read_class_folders(
    dataset: str,
    root: str | Path,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    files: type[Files],
    find: Find,
) -> ImageSet:
    """The splits under `root/{train,val,test}/<class>/`, or of `root/<class>/` divided by the fractions.

    Args as of `ImageFolder`; `dataset` is the name recorded, `files` what a split becomes, and `find` lists a folder.

    Raises:
        ConfigurationError: fractions that leave nothing to train on.
        DataError: a folder that is missing or empty, or too few files for a split.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{files.kind} folder {root} does not exist")
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise ConfigurationError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} must not be negative and sum below 1"
        )
    given = {
        split: next((root / name for name in names if (root / name).is_dir()), None)
        for split, names in SPLIT_FOLDERS.items()
    }
    if given["train"]:
        splits = {split: _class_files(folder, find, files.kind) for split, folder in given.items() if folder}
        division = "folders"
    else:
        splits = _divided(_class_files(root, find, files.kind), val_fraction, test_fraction, seed, files.kind)
        division = f"random, val {val_fraction:g}, test {test_fraction:g}, seed {seed}"
    class_names = sorted(set().union(*splits.values()))
    sources = {split: _labelled(classes, class_names, files) for split, classes in splits.items()}
    about = {
        "dataset": dataset,
        "task": root.resolve().name,
        "trained_on": "train",
        "selected_on": "val" if "val" in sources else None,
        "split": division,
    }
    return ImageSet(sources, class_names, about, kind=files.kind)


def _class_files(folder: Path, find: Find, kind: str) -> dict[str, list[Path]]:
    """What `find` finds in each class folder.

    Raises:
        DataError: no class folders, or one without files.
    """
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"{kind} folder {folder} holds no class folders; {kind}s must lie in {folder}/<class>/")
    classes = {path.name: find(path) for path in folders}
    for name, paths in classes.items():
        if not paths:
            raise DataError(f"class folder {folder / name} holds no {kind}s")
    return classes


def _divided(
    classes: dict[str, list[Path]], val_fraction: float, test_fraction: float, seed: int, kind: str
) -> dict[str, dict[str, list[Path]]]:
    """Split each class at random; splits of share 0 are left out.

    Raises:
        DataError: a split with a share above 0 gets nothing of any class.
    """
    splits: dict[str, dict[str, list[Path]]] = {"train": {}, "val": {}, "test": {}}
    for number, (name, paths) in enumerate(classes.items()):
        order = [paths[i] for i in permutation(len(paths), seed + number)]
        tests = min(round(len(order) * test_fraction), len(order) - 1)
        vals = min(round(len(order) * val_fraction), len(order) - 1 - tests)
        splits["test"][name] = sorted(order[:tests])
        splits["val"][name] = sorted(order[tests : tests + vals])
        splits["train"][name] = sorted(order[tests + vals :])
    for split, share in (("val", val_fraction), ("test", test_fraction)):
        if share == 0:
            del splits[split]
        elif not any(splits[split].values()):
            raise DataError(
                f"too few {kind}s for a {split} split of {share:g} of each class; "
                f"add {kind}s, or change {split}_fraction (0 leaves the split out)"
            )
    return splits


def _labelled(classes: dict[str, list[Path]], class_names: list[str], files: type[Files]) -> Files:
    pairs = [(path, class_names.index(name)) for name, paths in classes.items() for path in paths]
    return files([path for path, _ in pairs], [label for _, label in pairs])
