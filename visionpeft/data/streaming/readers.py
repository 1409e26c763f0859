"""Images that readers of timm, datasets and torchvision find, and that can be looked up: labelled before training."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from visionpeft.data.images import decode_image
from visionpeft.data.labels import Read
from visionpeft.data.records import ImageFiles, Row
from visionpeft.data.streaming.rows import (
    check_columns,
    check_images,
    check_split,
    content_of,
    names_of_classes,
    open_builder,
)
from visionpeft.errors import DataError, did_you_mean, one_line

# Splits of torchvision's data sets that have two.
TORCH_SPLITS = {"train": "train", "training": "train", "test": "test", "val": "test", "validation": "test"}
TORCH = ("mnist", "kmnist", "fashion_mnist")


class Reader(ABC):
    """Labelled images of a split.

    Attributes:
        rows: one for each image, with its name and label.
        class_names: names of the classes, where the data says them.
    """

    rows: list[Row]
    class_names: list[str] | None = None

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """RGB image; raises DataError when it is damaged."""


class ReaderImages(ImageFiles):
    """Images of a reader with labels.

    Args:
        reader: finds them.
        labels: class indices, tuples of them, or numbers, (n,).
        indices: of these images in the reader, (n,); all when absent.
    """

    def __init__(self, reader: Reader, labels: Sequence, indices: Sequence[int] | None = None):
        self.reader = reader
        self.indices = np.arange(len(reader.rows)) if indices is None else np.asarray(indices)
        super().__init__([reader.rows[index].path for index in self.indices], labels)

    def image(self, index: int) -> Image.Image:
        """RGB image; raises DataError when it is damaged."""
        return self.reader.image(int(self.indices[index]))

    def subset(self, indices: np.ndarray) -> "ReaderImages":
        """The images at `indices`."""
        return ReaderImages(self.reader, [self.labels[index] for index in indices], self.indices[indices])

    def check_exist(self) -> None:
        """The reader has found them."""


class FolderReader(Reader):
    """timm's reader of a folder for each class, at any depth.

    Args:
        folder: of the split.
        read: reads a label, the name of a folder.
    """

    def __init__(self, folder: Path, read: Read):
        from timm.data.readers.reader_image_folder import ReaderImageFolder

        if not folder.is_dir():
            raise DataError(f"folder {folder} does not exist")
        try:
            reader = ReaderImageFolder(str(folder))
        except RuntimeError as error:
            raise DataError(f"folder {folder} holds no images: {one_line(error)}") from None
        # timm numbers the classes that it finds in this split, and another split may have others.
        names = {index: name for name, index in reader.class_to_idx.items()}
        self.rows = [row_of(path, names[label], path, read) for path, label in reader.samples]

    def image(self, index: int) -> Image.Image:
        """RGB image; raises DataError when it is damaged."""
        path = self.rows[index].path
        return decode_image(Path(path), f"image file {path}")


class TarReader(Reader):
    """timm's reader of tar files: one for each class, or folders of classes in one, or tar files in one.

    Args:
        path: a tar file, or a folder of them.
        read: reads a label, the name of a folder or of a tar file.
    """

    def __init__(self, path: Path, read: Read):
        from timm.data.readers.reader_image_in_tar import ReaderImageInTar

        from visionpeft.data.streaming.shards import check_whole

        files = [path] if path.is_file() else sorted(path.glob("*.tar"))
        if not files:
            raise DataError(f"{path} is neither a tar file nor a folder of tar files")
        for file in files:
            check_whole(file)
        try:
            # It keeps what it finds as a pickle beside large files, and would read it from there.
            reader = ReaderImageInTar(str(path), cache_tarinfo=False)
        except MemoryError:
            raise
        except Exception as error:  # tarfile raises half a dozen types; without an image timm unpacks nothing
            raise DataError(f"{path} holds no tar files of images: {one_line(error)}") from error
        self.rows, self.places = [], []
        for (member, file, inner), label in zip(reader.samples, reader.targets, strict=True):
            outer = path if file is None else path / file
            name = f"{outer}/{member.name}"
            self.rows.append(row_of(name, reader.class_idx_to_name[label], name, read))
            # Read by its place: timm's open tar files have one position in the file for all workers that are forked.
            begin = member.offset_data + (inner.offset_data if inner is not None else 0)
            self.places.append((outer, begin, member.size))

    def image(self, index: int) -> Image.Image:
        """RGB image; raises DataError when it is damaged."""
        file, begin, size = self.places[index]
        try:
            with file.open("rb") as opened:
                opened.seek(begin)
                content = opened.read(size)
        except OSError as error:
            raise DataError(f"tar file {file} cannot be read: {error.strerror}") from error
        return decode_image(BytesIO(content), f"image {self.rows[index].path}")


class TableReader(Reader):
    """timm's reader of a Hugging Face data set, which is fetched as a whole, or is a local folder.

    Args:
        name: on the Hub, or the path of the folder.
        root: where the library keeps what it fetches; its own place when absent.
        split: of the data set; `train[:80%]` is a part of one.
        image_key: the column of images.
        label_key: the column of labels.
        read: reads a label.
    """

    def __init__(self, name: str, root: str | Path | None, split: str, image_key: str, label_key: str, read: Read):
        builder = open_builder(name, root)
        check_split(builder, split, name)
        from timm.data.readers import create_reader

        if builder.info.features:
            check_columns(list(builder.info.features), image_key, label_key, name)
            check_images(builder.info.features, image_key, name)
        keys = {"input_key": image_key, "target_key": label_key}
        try:
            self.reader = create_reader(f"hfds/{name}", root=None if root is None else str(root), split=split, **keys)
        except MemoryError:
            raise
        except Exception as error:  # its own types, pyarrow's, those of file systems and of HTTP
            check_images(open_builder(name, root).info.features, image_key, name)  # known now that they were fetched
            raise DataError(f"split '{split}' of the data set {name} cannot be read: {one_line(error)}") from error
        if not builder.info.features:  # timm's reader has cast the column, and hides what it was
            check_images(open_builder(name, root).info.features, image_key, name)
        table = self.reader.dataset
        check_columns(table.column_names, image_key, label_key, name)
        self.class_names = names_of_classes(table.features, label_key)
        self.image_key = image_key
        labels = table.select_columns([label_key])[:][label_key]
        if all(label is None or label == -1 for label in labels):
            raise DataError(f"the data set {name} has no labels in its split '{split}', as where they are kept secret")
        places = (f"row {number} of {name} ({split})" for number in range(len(labels)))
        self.rows = [row_of(where, label, where, read) for where, label in zip(places, labels, strict=True)]

    def image(self, index: int) -> Image.Image:
        """RGB image; raises DataError when it is damaged."""
        where = self.rows[index].where
        try:
            content = content_of(self.reader.dataset[index][self.image_key], where)
        except OSError as error:
            raise DataError(f"image {where} cannot be read: {one_line(error)}") from error
        return decode_image(BytesIO(content), f"image {where}")


class TorchReader(Reader):
    """A data set of torchvision's, as timm names it: those of handwriting and fashion.

    Those of the CIFAR family are pickles, which are not read, and the others are folders of images.

    Args:
        name: mnist, kmnist or fashion_mnist.
        root: the folder in which torchvision has put it.
        split: "train", or "test".
    """

    def __init__(self, name: str, root: str | Path | None, split: str):
        from timm.data import create_dataset

        if name not in TORCH:
            reason = {
                "cifar10": "its files are pickles, which are not read; use hfds/uoft-cs/cifar10",
                "cifar100": "its files are pickles, which are not read; use hfds/uoft-cs/cifar100",
            }.get(name, f"of torchvision's data sets, {', '.join(TORCH)} are; one of files is read by ImageFolder")
            raise DataError(f"torch/{name} is not among what is read: {reason}")
        if split not in TORCH_SPLITS:
            raise DataError(f"torch/{name} has no split '{split}'{did_you_mean(split, ('train', 'test'))}")
        if root is None:
            raise DataError(f"set --data.root to the folder in which torchvision has put {name}")
        try:
            self.images = create_dataset(f"torch/{name}", root=str(root), split=TORCH_SPLITS[split])
        except RuntimeError as error:
            raise DataError(
                f"torchvision does not find {name} in {root} ({one_line(error)}); let it download the files there"
            ) from None
        self.class_names = [str(each) for each in self.images.classes]
        names = (f"{name} {split} {number}" for number in range(len(self.images)))
        self.rows = [Row(where, label, where) for where, label in zip(names, self.images.targets.tolist(), strict=True)]

    def image(self, index: int) -> Image.Image:
        """RGB image."""
        return self.images[index][0].convert("RGB")


def row_of(path: str, label: object, where: str, read: Read) -> Row:
    """An image with its label as `read` reads it; raises DataError where it cannot."""
    try:
        return Row(path, read(label), where)
    except ValueError as error:
        raise DataError(f"{where} {error}, not {label!r}") from None


def folder_of(root: str | Path | None, split: str) -> Path:
    """Where a split lies, which may be a folder or a tar file of its name.

    Raises:
        DataError: there is none.
    """
    if root is None:
        raise DataError("set --data.root to the folder in which the splits lie")
    for place in (Path(root) / split, Path(root) / f"{split}.tar"):
        if place.exists():
            return place
    if not Path(root).is_dir():
        raise DataError(f"folder {root} does not exist")
    found = sorted(path.name for path in Path(root).iterdir() if path.is_dir() or path.suffix == ".tar")
    raise DataError(f"{root} has no split '{split}'{did_you_mean(split, found)}")
