"""Images or videos in a folder for each class, with splits in folders of their own or drawn at random."""

from collections.abc import Callable
from pathlib import Path

from visionpeft.data.class_index import indexed, otherwise
from visionpeft.data.images import left_out
from visionpeft.data.labels import Labels, reader
from visionpeft.data.ordering import permutation
from visionpeft.data.records import Files, ImageSet, Row
from visionpeft.errors import ConfigurationError, DataError

SPLIT_FOLDERS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "tst"),
}

Find = Callable[[Path], list[Path]]


def read_class_folders(
    dataset: str,
    root: str | Path,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    files: type[Files],
    find: Find,
    labels: Labels = "classes",
    separator: str = ";",
) -> ImageSet:
    """The splits under `root/{train,val,test}/<class>/`, or of `root/<class>/` divided by the fractions.

    The first layout is taken where every folder has the name of a split (`SPLIT_FOLDERS`, in any case); it may be that
    of the test alone, on which a finished run is scored.

    Args as of `ImageFolder`; `dataset` is the name recorded, `files` what a split becomes, and `find` lists a folder.

    Raises:
        ConfigurationError: fractions that leave nothing to train on.
        DataError: a folder that is missing or empty, names of splits beside others, too few files for a split, or a
            folder whose name is no such label.
    """
    root = Path(root)
    if not root.is_dir():
        is_file = root.is_file()
        what = f"is a file; give the folder that holds the {files.kind}s" if is_file else "does not exist"
        raise DataError(f"{files.kind} folder {root} {what}")
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise ConfigurationError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} must not be negative and sum below 1"
        )
    if given := _split_folders(root, find, files.kind):
        splits = {split: _class_files(folder, find, files.kind) for split, folder in given.items()}
        division = "folders"
    else:
        classes = _class_files(root, find, files.kind)
        if labels == "number":  # a folder may hold a single image
            splits = _divided_together(classes, val_fraction, test_fraction, seed, files.kind)
        else:
            splits = _divided(classes, val_fraction, test_fraction, seed, files.kind)
        division = f"random, val {val_fraction:g}, test {test_fraction:g}, seed {seed}"
    folders = sorted(set().union(*splits.values()))
    class_names, learnt = _learnt(root, folders, labels, separator)
    label_of = dict(zip(folders, learnt, strict=True))
    sources = {split: _labelled(classes, label_of, files) for split, classes in splits.items()}
    about = {
        "dataset": dataset,
        "task": root.resolve().name,
        "trained_on": "train" if "train" in sources else None,
        "selected_on": "val" if "val" in sources else None,
        "split": division,
    }
    remark = left_out(root, [path for source in sources.values() for path in source.paths], files.kind)
    notes = [remark] if remark else []
    if labels == "classes" and files.kind == "image" and (seen := otherwise([Row("", name, "") for name in folders])):
        notes.append(
            f"each folder is a class, also {seen[1].label}; --data.labels {seen[0]} reads the names of folders as "
            + ("numbers" if seen[0] == "number" else "several labels")
        )
    return ImageSet(sources, class_names, about, notes=notes, kind=files.kind, labels=labels)


def _learnt(root: Path, folders: list[str], labels: Labels, separator: str) -> tuple[list[str], list]:
    """Class names, and the label that is learnt of each folder."""
    if labels == "classes":  # each folder is one, whatever it is called
        return folders, list(range(len(folders)))
    read, rows = reader(labels, separator), []
    for name in folders:
        try:
            rows.append(Row(name, read(name), f"folder {root}"))
        except ValueError as error:
            raise DataError(f"folder '{name}' in {root} {error}; labels are the names of folders") from None
    return indexed(rows, labels, None)


def _split_folders(root: Path, find: Find, kind: str) -> dict[str, Path]:
    """The folder of each split, in the order of training, selection and test; none where folders are classes.

    Raises:
        DataError: some folders have names of splits and others do not, two are of one split, or there is none to train
            on.
    """
    folders = _visible_folders(root)
    found: dict[str, list[Path]] = {}
    for split, names in SPLIT_FOLDERS.items():
        if of_split := [folder for folder in folders if folder.name.casefold() in names]:
            found[split] = of_split
    named = [folder for of_split in found.values() for folder in of_split]
    if not named:
        return {}
    # A folder beside them in which nothing is found, such as one of annotations, is no class.
    if others := [folder.name for folder in folders if folder not in named and find(folder)]:
        # A class may be called train; only a folder of folders could be either.
        if not any(_visible_folders(folder) for folder in named):
            return {}
        raise DataError(
            f"{root} is ambiguous: {', '.join(folder.name for folder in named)} would be a split with class folders, "
            f"but {others[0]} is no name of a split. Leave only folders of splits ({', '.join(SPLIT_FOLDERS)}) in it; "
            "or, if all of these are classes, rename the first, or put its files into it without further folders"
        )
    for split, of_split in found.items():
        if len(of_split) > 1:
            raise DataError(
                f"{root} is ambiguous: {' and '.join(folder.name for folder in of_split)} both name the {split} split; "
                "leave one"
            )
    if "train" not in found and list(found) != ["test"]:  # a test alone is what a finished run is scored on
        raise DataError(
            f"{root} holds {' and '.join(folder.name for folder in named)}, which are names of splits, and no train "
            f"folder with {kind}s to train on; add it, or rename what is a class"
        )
    return {split: folder for split, (folder,) in found.items()}


def _visible_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _class_files(folder: Path, find: Find, kind: str) -> dict[str, list[Path]]:
    """What `find` finds in each class folder.

    Raises:
        DataError: no class folders, or one without files.
    """
    folders = _visible_folders(folder)
    if not folders:
        raise DataError(f"{kind} folder {folder} holds no class folders; {kind}s must lie in {folder}/<class>/")
    classes = {path.name: find(path) for path in folders}
    for name, paths in classes.items():
        if not paths:
            remark = left_out(folder / name, [], kind)
            raise DataError(f"class folder {folder / name} holds no {kind}s" + (f"; {remark}" if remark else ""))
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


def _divided_together(
    folders: dict[str, list[Path]], val_fraction: float, test_fraction: float, seed: int, kind: str
) -> dict[str, dict[str, list[Path]]]:
    """As `_divided`, of the files of all folders as if they were in one."""
    together = {"": sorted(path for paths in folders.values() for path in paths)}
    divided = _divided(together, val_fraction, test_fraction, seed, kind)
    splits = {split: set(paths[""]) for split, paths in divided.items()}
    return {
        split: {name: [path for path in paths if path in chosen] for name, paths in folders.items()}
        for split, chosen in splits.items()
    }


def _labelled(classes: dict[str, list[Path]], label_of: dict[str, object], files: type[Files]) -> Files:
    pairs = [(path, label_of[name]) for name, paths in classes.items() for path in paths]
    return files([path for path, _ in pairs], [label for _, label in pairs])
