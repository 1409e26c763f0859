"""Hugging Face data sets as streams: nothing is kept on disk, and processes and workers share the files."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from visionpeft.data.streaming.stream import Encoded, Share, Shuffle, Stream
from visionpeft.errors import DataError, did_you_mean, one_line


class Rows(Stream):
    """Rows of a `datasets.IterableDataset`.

    Args:
        dataset: whose column of images is not decoded.
        size: how many rows there are; None if that is not known.
        image_key: the column of images.
        label_key: the column of labels.
        name: what messages call the data set.
    """

    def __init__(self, dataset, size: int | None, image_key: str, label_key: str, name: str):
        super().__init__(size)
        self.dataset = dataset
        self.image_key = image_key
        self.label_key = label_key
        self.name = name

    def check(self) -> Encoded:
        """The first image; raises DataError where there is none, or it cannot be read."""
        first = next(self.samples(Share()), None)
        if first is None:
            raise DataError(f"{self.name} holds no images")
        return first

    def parts(self, processes: int) -> int:
        """As many as there are files for it."""
        files = self.dataset.num_shards
        return files // processes if files % processes == 0 else files

    def samples(self, share: Share, shuffle: Shuffle | None = None) -> Iterator[Encoded]:
        """The images of a share; datasets itself finds out in which worker it is called."""
        from datasets.distributed import split_dataset_by_node

        dataset = self.dataset
        if shuffle is not None:
            # One file at a time: with several, each epoch would end with five seconds of sleep, and leave threads
            # (findings/datasets_shuffled_stream_sleeps_at_the_end_of_each_pass.sh).
            dataset = dataset.shuffle(seed=shuffle.seed, buffer_size=shuffle.buffer, max_buffer_input_shards=1)
        if share.processes > 1:
            dataset = split_dataset_by_node(dataset, share.rank, share.processes)
        try:
            for number, row in enumerate(dataset):
                where = f"{number} of {self.name}" + (f" in worker {share.worker}" if share.workers > 1 else "")
                yield Encoded(content_of(row[self.image_key], where), row[self.label_key], where)
        except (DataError, MemoryError):
            raise
        # pyarrow, the file systems and what is under them (HTTP, TLS, clouds) raise dozens of types.
        except Exception as error:
            raise DataError(
                f"{self.name} cannot be read ({one_line(error)}); a file is missing, cut or damaged: fetch it again"
            ) from error


def content_of(image: dict | None, where: str) -> bytes:
    """The bytes of an image that was not decoded.

    Raises:
        DataError: there is none.
    """
    if not image or not (image.get("bytes") or image.get("path")):
        raise DataError(f"image {where} is empty")
    if image.get("bytes"):
        return image["bytes"]
    from datasets.utils.file_utils import xopen

    with xopen(image["path"], "rb") as file:
        return file.read()


def open_builder(name: str, root: str | Path | None):
    """The library's description of a data set, by its name on the Hub or the path of a local folder.

    Raises:
        DataError: there is none, or it is one of tar files, which the library would decode by their endings.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(name, cache_dir=None if root is None else str(root))
    except MemoryError:
        raise
    except Exception as error:  # its own types, those of huggingface_hub, of file systems and of HTTP
        raise DataError(f"the data set {name} cannot be opened: {one_line(error)}") from error
    if builder.name == "webdataset":
        raise DataError(f"the data set {name} is made of WebDataset shards; read them by --data.source wds")
    return builder


def known_splits(builder) -> list[str]:
    """Names of the splits, as far as the data set says them before it is read."""
    files = getattr(builder.config, "data_files", None) or {}
    return sorted({*map(str, builder.info.splits or ()), *map(str, files)})


def check_split(builder, split: str, name: str) -> None:
    """Raise DataError naming the splits there are, where one is asked for that is none of them.

    Args:
        builder: the library's description of the data set.
        split: as it was given; `train[:80%]` is a part of the split `train`.
        name: of the data set.
    """
    known = known_splits(builder)
    for part in split.split("+"):
        if known and part.partition("[")[0].strip() not in known:
            raise DataError(f"the data set {name} has no split '{split}'{did_you_mean(split, known)}")


def stream_rows(builder, split: str, size: int | None, image_key: str, label_key: str, name: str) -> Rows:
    """A split as a stream.

    Args:
        builder: the library's description of the data set.
        split: name of the split.
        size: images in it; what the data set says when absent.
        image_key: the column of images.
        label_key: the column of labels.
        name: of the data set.

    Raises:
        DataError: there is no such split or column, or a local file is cut.
    """
    import datasets

    check_split(builder, split, name)
    try:
        stream = builder.as_streaming_dataset(split=split)
        described = (builder.info.splits or {}).get(split)
        if size is None:
            size = (described.num_examples if described else None) or _rows_of_local_files(builder, split)
    except MemoryError:
        raise
    except Exception as error:  # its own types, pyarrow's, those of file systems and of HTTP
        raise DataError(f"split '{split}' of the data set {name} cannot be opened: {one_line(error)}") from error
    check_columns(stream.column_names or list(next(iter(stream), {})), image_key, label_key, f"{name} ({split})")
    check_images(stream.features, image_key, f"{name} ({split})")
    stream = stream.cast_column(image_key, datasets.Image(decode=False))
    return Rows(stream, size, image_key, label_key, f"{name} ({split})")


def check_columns(columns: list[str], image_key: str, label_key: str, name: str) -> None:
    """Raise DataError where a column is missing.

    Args:
        columns: their names.
        image_key: that of the images.
        label_key: that of the labels.
        name: of the data set.
    """
    for key, what, option in ((image_key, "images", "image_key"), (label_key, "labels", "label_key")):
        if key not in columns:
            raise DataError(
                f"{name} has no column '{key}' of {what}; it has {', '.join(columns)} (name the one to take with "
                f"--data.{option})"
            )


def check_images(features: Mapping | None, image_key: str, name: str) -> None:
    """Raise DataError where a row has several images, or a group of columns, in the place of one image.

    Args:
        features: of the data set, as the library has them; None where it does not know them.
        image_key: the column of images.
        name: of the data set.
    """
    import datasets

    feature = (features or {}).get(image_key)
    members = feature if isinstance(feature, list) else [getattr(feature, "feature", None)]
    if any(isinstance(each, datasets.Image) for each in members):
        raise DataError(
            f"each row of {name} has a list of images in the column '{image_key}', and one image is learnt here; make "
            "a column of single images (datasets.Image), or name another with --data.image_key"
        )
    if isinstance(feature, dict) and any(isinstance(each, datasets.Image) for each in feature.values()):
        raise DataError(
            f"the column '{image_key}' of {name} is a group of {', '.join(feature)}, and one image is learnt here; "
            "make it a column of its own with Dataset.flatten()"
        )


def _rows_of_local_files(builder, split: str) -> int | None:
    """How many rows local Parquet files hold by their own account; None of others."""
    files = list((getattr(builder.config, "data_files", None) or {}).get(split, ()))
    if builder.name != "parquet" or not files or any("://" in str(file) for file in files):
        return None
    import pyarrow.parquet

    return sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)


def names_of_classes(features, label_key: str) -> list[str] | None:
    """The names that a data set gives its classes, if it does.

    Args:
        features: of the data set, as the library has them.
        label_key: the column of labels; of several labels, too.
    """
    feature = (features or {}).get(label_key)
    while hasattr(feature, "feature"):
        feature = feature.feature
    names = getattr(feature, "names", None)
    return None if names is None else list(names)
