"""What `StreamedImages` is asked for, opened: streams, or images that can be looked up, with the names of classes."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from visionpeft.data.annotations import read_text
from visionpeft.data.class_index import check_classes, indexed
from visionpeft.data.labels import Labels, Read
from visionpeft.data.records import ImageSet
from visionpeft.data.streaming.readers import (
    FolderReader,
    Reader,
    ReaderImages,
    TableReader,
    TarReader,
    TorchReader,
    folder_of,
)
from visionpeft.data.streaming.rows import names_of_classes, open_builder, stream_rows
from visionpeft.data.streaming.shards import IMAGES, Shards, find_shards
from visionpeft.data.streaming.stream import Stream
from visionpeft.errors import ConfigurationError, DataError, did_you_mean

STREAMS = ("wds", "hfids")
NAMED = ("hfds", "hfids", "torch")
KINDS = (*NAMED, "wds", "folder", "tar")
PACKAGES = {"wds": "webdataset", "hfds": "datasets", "hfids": "datasets"}


class StreamSet(ImageSet):
    """Streams of labelled images, of which only the classes are known before they are read."""

    def check(self) -> None:
        """Check that there are two classes; raises DataError."""
        if len(self.class_names) < 2:
            raise DataError(f"a data set needs at least two classes, found {len(self.class_names)}")


def parsed(source: str) -> tuple[str, str]:
    """The kind of a source and the name after it, as timm writes them: `hfds/NAME`.

    Raises:
        ConfigurationError: there is no such kind, a name is missing, or the library that reads it is not installed.
    """
    kind, _, name = source.partition("/")
    kind = kind.lower()
    if kind not in KINDS:
        raise ConfigurationError(f"there is no source '{source}'{did_you_mean(kind, KINDS)}")
    if (kind in NAMED) != bool(name):
        form = f"{kind}/NAME" if kind in NAMED else kind
        raise ConfigurationError(f"source '{source}' is written {form}; where it lies is --data.root")
    package = PACKAGES.get(kind)
    if package is not None and not is_installed(package):
        raise ConfigurationError(
            f"--data.source {kind} is read by the package {package}, which is not installed; run pip install "
            "'visionpeft[streaming]'"
        )
    return kind, name


def is_installed(package: str) -> bool:
    """Whether a package can be imported; a folder of that name, such as `datasets/`, is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def names_given(class_names: Sequence[str] | str | None) -> list[str] | None:
    """Names of classes as they were given: themselves, or the lines of a file.

    Raises:
        DataError: the file is missing, or has one name twice.
    """
    if class_names is None:
        return None
    if isinstance(class_names, str):
        lines = read_text(Path(class_names)).splitlines()
        class_names = [line.strip() for line in lines if line.strip()]
    names = list(map(str, class_names))
    if len(set(names)) < len(names):
        raise DataError(f"class_names has '{next(name for name in names if names.count(name) > 1)}' more than once")
    return names


def agreed_names(given: list[str] | None, known: list[str] | None, source: str) -> list[str] | None:
    """The names that were given, or those of the data set.

    Raises:
        ConfigurationError: they are not equally many.
    """
    if given is not None and known is not None and len(given) != len(known):
        raise ConfigurationError(f"class_names has {len(given)} names, but {source} has {len(known)} classes")
    return known if given is None else given


def check_of_streams(labels: Labels, options: Mapping) -> None:
    """Refuse what needs all images, or their labels, before they are read.

    Args:
        labels: what a label is.
        options: of every data module.

    Raises:
        ConfigurationError: such an option is set.
    """
    lookup = "use a data set that is fetched as a whole (--data.source hfds/...), or ImageFolder"
    if labels != "classes":
        raise ConfigurationError(f"labels '{labels}' are not read from streams; {lookup}")
    needs = {
        "test_samples": "takes a fixed subset of the images",
        "skip_corrupt": "opens every image before training",
        "balanced": "draws images by their labels",
        "views": "shows an image again as it was shown before",
    }
    for option, reason in needs.items():
        if options.get(option):
            raise ConfigurationError(f"{option} {reason}, and a stream is only read in order; {lookup}")


def open_streams(
    kind: str,
    name: str,
    root: str | Path | None,
    splits: Mapping[str, str],
    num_samples: Mapping[str, int] | None,
    image_key: str | None,
    label_key: str | None,
) -> tuple[dict[str, Stream], list[str] | None]:
    """Streams by split, and the names of the classes where the data has them.

    Args:
        kind: "wds" or "hfids".
        name: of the Hugging Face data set.
        root: where it lies.
        splits: what the splits are called there.
        num_samples: images of splits, where it was given.
        image_key: as of `StreamedImages`.
        label_key: as of `StreamedImages`.

    Raises:
        ConfigurationError: it is not known how many images there are to train on.
        DataError: something is missing or cut.
    """
    sizes = _sizes(num_samples or {}, splits)
    streams: dict[str, Stream] = {}
    names = None
    if kind == "wds":
        endings = tuple(ending.strip(". ").lower() for ending in image_key.split(";")) if image_key else IMAGES
        for key, split in splits.items():
            addresses, number = find_shards(root, split)
            streams[key] = Shards(addresses, sizes.get(key, number), endings, label_key)
    else:
        builder = open_builder(name, root)
        image_key, label_key = image_key or "image", label_key or "label"
        for key, split in splits.items():
            streams[key] = stream_rows(builder, split, sizes.get(key), image_key, label_key, name)
        names = names_of_classes(streams[key].dataset.features, label_key)
    if "train" in streams and streams["train"].size is None:
        written = f", or --data.train '{splits['train']}|50000'" if kind == "wds" else ""
        raise ConfigurationError(
            f"{kind} does not say how many images split '{splits['train']}' holds, and the learning rate follows the "
            f"steps of an epoch; say it with --data.num_samples '{{train: 50000}}'{written}"
        )
    return streams, names


def _sizes(given: Mapping[str, int], splits: Mapping[str, str]) -> dict[str, int]:
    for key, number in given.items():
        if key not in splits:
            raise ConfigurationError(f"num_samples names '{key}'{did_you_mean(key, splits)}")
        if number < 1:
            raise ConfigurationError(f"num_samples of '{key}' must be 1 or more, not {number}")
    return dict(given)


def open_reader(
    kind: str, name: str, root: str | Path | None, split: str, image_key: str, label_key: str, read: Read
) -> Reader:
    """A split whose images can be looked up; arguments as of `open_streams`, and `read` reads a label.

    Raises:
        DataError: something is missing or cut.
    """
    if kind == "hfds":
        return TableReader(name, root, split, image_key, label_key, read)
    if kind == "torch":
        return TorchReader(name.lower(), root, split)
    place = folder_of(root, split)
    return TarReader(place, read) if kind == "tar" else FolderReader(place, read)


def labelled(
    readers: Mapping[str, Reader], given: list[str] | None, labels: Labels, source: str
) -> tuple[dict[str, ReaderImages], list[str]]:
    """Images by split with their labels as they are learnt, and the names of the classes.

    Args:
        readers: by split.
        given: names of the classes as they were given.
        labels: what a label is.
        source: for messages.

    Raises:
        ConfigurationError: as of `agreed_names`.
        DataError: a label that is none, or beyond the classes.
    """
    every = [row for reader in readers.values() for row in reader.rows]
    names = agreed_names(given, _first(reader.class_names for reader in readers.values()), source)
    if labels == "classes" and names is None:
        check_classes(every, "image")
    names, learnt = indexed(every, labels, names)
    in_order = iter(learnt)
    sources = {key: ReaderImages(reader, list(islice(in_order, len(reader.rows)))) for key, reader in readers.items()}
    return sources, names


def _first(found: Iterable[list[str] | None]) -> list[str] | None:
    return next((names for names in found if names), None)
