"""Images that other libraries' readers bring: WebDataset shards, Hugging Face data sets, and what timm reads."""

from pathlib import Path, PurePosixPath

from visionpeft.backbones.preprocessing import Resize
from visionpeft.data.dataset import ImageDataset, TrainLoader
from visionpeft.data.labels import Written, reader
from visionpeft.data.module import ImageDataModule
from visionpeft.data.records import ImageSet
from visionpeft.data.streaming.loader import StreamLoader, StreamTrainLoader
from visionpeft.data.streaming.sources import (
    STREAMS,
    StreamSet,
    agreed_names,
    check_of_streams,
    labelled,
    names_given,
    open_reader,
    open_streams,
    parsed,
)
from visionpeft.data.streaming.stream import ClassOf, StreamDataset
from visionpeft.data.transforms import Augmentation
from visionpeft.errors import ConfigurationError


class StreamedImages(ImageDataModule):
    """Images that libraries made for them read, local or remote; sources are named as timm names them.

    - `wds`: WebDataset shards, read as a stream. The root is their folder or address, a split is
      `train-{0000..0007}.tar`, with the number of images `train-{0000..0007}.tar|50000`, or a name in `_info.json`.
    - `hfids/NAME`: a Hugging Face data set, read as a stream. NAME is that on the Hub, or the path of a local folder of
      Parquet files; the root is where the library keeps what it fetches, a split is `train`.
    - `hfds/NAME`: the same, fetched as a whole and looked up; a split may also be `train[:80%]`.
    - `torch/NAME`: torchvision's mnist, kmnist or fashion_mnist in the root, with the splits `train` and `test`.
    - `folder`: a folder for each class; a split is a folder in the root.
    - `tar`: tar files of images; a split is one, or a folder of them with one for each class, in the root.

    No code of a data set is run, and nothing is unpickled. Of all but the first two, all labels are known before
    training, and they are like every other data set. Streams are not:

    - An epoch has as many images as the training split is said to hold, and one process reads each of them once.
      Shards are shuffled anew in each epoch, and images in a buffer.
    - Processes that train together share the shards if these can be shared evenly, and otherwise the images. In
      validation and test each image counts once. In an epoch of training all devices take equally many, so that with
      shares of different sizes some images are seen twice in it, and some not.
    - A run that is resumed in the middle of an epoch goes on with the very next image, with as many devices and workers
      as before: what it has seen is read once more, but not decoded.
    - Before training, the first image of each split and the ends of local shards are looked at. What is wrong further
      on stops the run when it is met.

    Args:
        source: what is read, as above.
        root: as above.
        train: training split; null for data that is only scored.
        val: split for selection.
        test: split for the test.
        num_samples: images of splits of a stream that do not say how many they are, such as `{train: 50000}`. For
            training it has to be known; for the others one process checks it.
        class_names: names in the order of the labels, or a text file with one a line; those of the data set where it
            has names. Shards have none.
        image_key: column of the images, "image" when absent; of shards the endings of images, separated by semicolons,
            "jpg;jpeg;png;webp" when absent.
        label_key: column of the labels, "label" when absent; of shards a field of the `.json` file of an image, its
            `.cls` file when absent.
        labels: what a label is: one of "classes", "several" of them, or a "number"; in streams "classes".
        separator: what stands between several labels in a text.
        shuffle_buffer: images of a stream, not decoded, from which the next one is drawn, in each worker.
        resize: "squash" to the input size, or "crop": resize to cover, then cut.
        augmentation: of training images: "none", "crop_flip" or "random_resized_crop".

    Raises:
        ConfigurationError: an unknown source, a library that is not installed, a number of images that is not known, or
            an option that a stream cannot take.
        DataError: a split, column, shard or file that is missing or cut, images without labels, or a label beyond the
            classes.
    """

    def __init__(
        self,
        source: str,
        root: str | Path | None = None,
        train: str | None = "train",
        val: str | None = None,
        test: str | None = None,
        num_samples: dict[str, int] | None = None,
        class_names: list[str] | str | None = None,
        image_key: str | None = None,
        label_key: str | None = None,
        labels: Written = "classes",
        separator: str = ";",
        shuffle_buffer: int = 1000,
        resize: Resize = "crop",
        augmentation: Augmentation = "crop_flip",
        **kwargs,
    ):
        kind, name = parsed(source)
        splits = {key: split for key, split in (("train", train), ("val", val), ("test", test)) if split}
        if not splits:
            raise ConfigurationError("name a split to train on (--data.train), or one to score (--data.test)")
        if shuffle_buffer < 1:
            raise ConfigurationError(f"shuffle_buffer {shuffle_buffer} must be 1 or more")
        given = names_given(class_names)
        self.streams = kind in STREAMS
        self.shuffle_buffer = shuffle_buffer
        about = {
            "dataset": type(self).__name__,
            "task": (PurePosixPath(name) if name else PurePosixPath(str(root or ""))).name or kind,
            # Without the folders of this machine, because the record is published with what was trained.
            "source": f"{kind}/{PurePosixPath(name).name if Path(name).exists() else name}" if name else kind,
            "splits": {key: split.rpartition("/")[2] for key, split in splits.items()},
            "trained_on": "train",
            "selected_on": "val" if val else None,
        }
        if self.streams:
            check_of_streams(labels, kwargs)
            sources, known = open_streams(kind, name, root, splits, num_samples, image_key, label_key)
            names = agreed_names(given, known, source)
            if names is None:
                raise ConfigurationError(
                    f"{source} does not say what its classes are called; name them in the order of the labels, or in a "
                    "text file with one a line: --data.class_names classes.txt"
                )
            images = StreamSet(sources, names, about)
        else:
            if num_samples is not None:
                raise ConfigurationError(f"{source} knows how many images it has; leave num_samples out")
            keys = (image_key or "image", label_key or "label", reader(labels, separator))
            readers = {key: open_reader(kind, name, root, split, *keys) for key, split in splits.items()}
            sources, names = labelled(readers, given, labels, source)
            images = ImageSet(sources, names, about, labels=labels)
        self._class_of = ClassOf(names)
        super().__init__(images, resize=resize, augmentation=augmentation, **kwargs)

    @property
    def deterministic_views(self) -> int | None:
        """In how many ways each training image is seen, if it can be looked up; None of streams."""
        return None if self.streams else super().deterministic_views

    def setup(self, stage: str | None = None) -> None:
        """Look at the first image of each split of a stream and at the ends of its shards; else as every data module.

        Raises:
            DataError: something is missing, cut, or without a label.
        """
        if not self.streams:
            super().setup(stage)
        elif not self._checked:
            for stream in self.sources.values():
                first = stream.check()
                self._class_of(first)
                first.decode()
            self._checked = True

    def dataset(self, split: str) -> ImageDataset:
        """The images of a split that can be looked up.

        Raises:
            DataError: there is no such split.
            ConfigurationError: `preprocessing` was not set, or they are a stream.
        """
        if self.streams:
            raise ConfigurationError(
                "what is computed from all images before training needs images that can be looked up, and a stream is "
                "only read in order; use a data set that is fetched as a whole (--data.source hfds/...), or ImageFolder"
            )
        return super().dataset(split)

    def train_loader(self, num_processes: int = 1, rank: int = 0) -> TrainLoader | StreamTrainLoader:
        """The share of the shuffled batches that one of several processes trains on; all of them by default."""
        if not self.streams:
            return super().train_loader(num_processes, rank)
        dataset = self._stream("train", num_processes, rank, buffer=self.shuffle_buffer)
        return StreamTrainLoader(dataset, "train", self.num_workers, self.drop_last)

    def _measured(self, split: str):
        if not self.streams:
            return super()._measured(split)
        return StreamLoader(self._stream(split, *self._processes), split, self.num_workers)

    def _stream(self, split: str, processes: int, rank: int, buffer: int | None = None) -> StreamDataset:
        self._check_ready(split)
        size = self.batch_size if split == "train" else self.test_batch_size or self.batch_size
        return StreamDataset(
            self.sources[split],
            self._transform(split),
            self._class_of,
            batch_size=size,
            rank=rank,
            processes=processes,
            seed=self._seed(),
            buffer=buffer,
        )
