"""People's own images in lists, and the embedded clip-art set."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

from visionpeft.backbones.preprocessing import Resize
from visionpeft.data.annotations import read_list
from visionpeft.data.class_index import check_classes, check_numbers, indexed
from visionpeft.data.labels import Labels, Written, reader
from visionpeft.data.module import ImageDataModule
from visionpeft.data.records import Files, ImageFiles, ImageSet, Row, check_disjoint, path_inside, without_duplicates
from visionpeft.data.transforms import Augmentation
from visionpeft.errors import DataError
from visionpeft.files import shipped


class ImageList(ImageDataModule):
    """Images listed with their labels in one file for each split: CSV or JSON.

    CSV files start with the header `path,label`; JSON files hold `{path: label}`, `[[path, label], ...]` or
    `[{"path": ..., "label": ...}, ...]`. What a label is, `labels` says:

    - "classes": one class name or integer;
    - "several": class names or integers with the separator between them, `cat;dog`, in JSON also an array; an empty
      label says that none applies;
    - "number": a finite number, which is learnt as such.

    Args:
        train: list of training images.
        val: list of images for selection.
        test: list of images for the test.
        root: folder that the paths are relative to and may not leave; "auto" is the folder of the training list. With
            null, paths may lie anywhere, absolute or relative to the working directory.
        class_names: names in the order of the labels; the sorted labels found in the lists when absent. A label is the
            name of its class or its index; one that is a name of one class and the index of another is refused.
        labels: what a label is: one of "classes", "several" of them, or a "number".
        separator: what stands between several labels.
        resize: "squash" to the input size, or "crop": resize to cover, then cut.
        augmentation: of training images: "none", "crop_flip" or "random_resized_crop".

    Raises:
        DataError: a list that is missing or malformed, a path outside the root, a label out of range or with two
            meanings, an image in two splits, one class only, or a class without training images; labels that are read
            as classes, without `class_names`, and seem to be numbers or several each; numbers that are all the same.
    """

    def __init__(
        self,
        train: str | Path,
        val: str | Path | None = None,
        test: str | Path | None = None,
        root: str | Path | None = "auto",
        class_names: Sequence[str] | None = None,
        labels: Written = "classes",
        separator: str = ";",
        resize: Resize = "crop",
        augmentation: Augmentation = "crop_flip",
        **kwargs,
    ):
        lists = {"train": train, "val": val, "test": test}
        read = partial(read_list, read=reader(labels, separator))
        images = read_lists(type(self).__name__, lists, root, class_names, ImageFiles, read, labels)
        super().__init__(images, resize=resize, augmentation=augmentation, **kwargs)


class ClipArt(ImageList):
    """The embedded set: public-domain drawings from Open Clip Art, with fixed splits (datasets/clipart).

    Args:
        train_on: "train" selects on val; "train+val" trains on both and selects on nothing.
        resize: "squash" to the input size (the drawings are square), or "crop": resize to cover, then cut.
        augmentation: of training images: "none", "crop_flip" or "random_resized_crop".
    """

    def __init__(
        self,
        train_on: Literal["train", "train+val"] = "train",
        resize: Resize = "squash",
        augmentation: Augmentation = "crop_flip",
        **kwargs,
    ):
        folder = shipped("datasets") / "clipart"
        super().__init__(
            folder / "train.csv",
            folder / "val.csv",
            folder / "test.csv",
            root=folder,
            class_names=None,
            resize=resize,
            augmentation=augmentation,
            **kwargs,
        )
        if train_on == "train+val":
            train, val = self.sources["train"], self.sources.pop("val")
            self.sources["train"] = ImageFiles(train.paths + val.paths, train.labels + val.labels)
            self.images.about |= {"trained_on": train_on, "selected_on": None}
            self.skipped.pop("val")


def read_lists(
    dataset: str,
    lists: dict[str, str | Path | None],
    root: str | Path | None,
    class_names: Sequence[str] | None,
    files: type[Files],
    read: Callable[[Path], list[Row]],
    labels: Labels = "classes",
) -> ImageSet:
    """The splits listed, each in its file.

    Args as of `ImageList`; `dataset` is the name recorded, `files` what a split becomes, and `read` reads a list.

    Raises:
        DataError: a list that is missing or malformed, a path outside the root, a label out of range or with two
            meanings, or a file in two splits; labels read as classes that seem to be something else.
    """
    lists = {split: Path(file) for split, file in lists.items() if file}
    splits = {split: without_duplicates(read(file), files.kind) for split, file in lists.items()}
    check_disjoint(splits, files.kind)
    every = [row for rows in splits.values() for row in rows]
    if labels == "classes" and class_names is None:
        check_classes(every, files.kind)
    if labels != "number" and class_names is not None:
        check_numbers(every, class_names)
    if twice := [name for name, count in Counter(class_names or ()).items() if count > 1]:
        raise DataError(f"class {twice[0]!r} is named twice in class_names; each label needs a name of its own")
    names, learnt = indexed(every, labels, class_names)
    folder = lists["train"].parent if root == "auto" else root
    if folder is not None and not Path(folder).is_dir():
        raise DataError(
            f"root {folder} of the {files.kind}s in the lists does not exist; their paths are relative to it (with "
            "--data.root auto, to the folder of the training list)"
        )

    def place(row: Row) -> Path:
        return Path(row.path) if folder is None else path_inside(Path(folder), row.path, row.where, files.kind)

    in_order = iter(learnt)
    sources = {
        split: files([place(row) for row in rows], list(islice(in_order, len(rows)))) for split, rows in splits.items()
    }
    about = {
        "dataset": dataset,
        "task": lists["train"].resolve().parent.name,
        "trained_on": "train",
        "selected_on": "val" if "val" in sources else None,
    }
    return ImageSet(sources, names, about, kind=files.kind, labels=labels)
