"""Images and labels of VTAB-1k tasks in their published archives, divided as VTAB-1k does.

Zhai et al. 2019, https://arxiv.org/abs/1910.04867. Its splits are the first images of TensorFlow Datasets, which
shuffles when it builds them. That order is not rebuilt here: the pools of training, validation and test images are
VTAB-1k's wherever the publisher defines them, and within a pool images are drawn by a seed of our own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from visionpeft.data import dsprites
from visionpeft.data.annotations import read_json
from visionpeft.data.dsprites import FACTOR_SIZES, FACTORS, factors_of
from visionpeft.data.images import list_images
from visionpeft.data.ordering import permutation
from visionpeft.data.preparation.annotations import lines, matlab, norb_matrix, npz_rows
from visionpeft.data.preparation.unpack import unpack
from visionpeft.data.records import ImageFiles, Source
from visionpeft.errors import DataError

TRAIN, VAL = 800, 200
CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)


@dataclass(frozen=True)
class Division:
    """The three splits of a task.

    Args:
        train800: 800 training images,
        val200: 200 of the validation pool,
        test: the test images.
        rule: where they come from.
        official_test: the test images are those the publisher defines.
    """

    train800: Source
    val200: Source
    test: Source
    rule: str
    official_test: bool


class Pixels:
    """Images in memory with labels.

    Args:
        images: uint8 (n, height, width) or (n, height, width, 3).
        labels: class indices, (n,).
    """

    def __init__(self, images: np.ndarray, labels: Sequence[int]):
        self.images = images
        self.labels = [int(label) for label in labels]

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """The image as it is published, gray or RGB."""
        return Image.fromarray(np.ascontiguousarray(self.images[index]))

    def name(self, index: int) -> str:
        """Its position."""
        return f"image {index}"

    def subset(self, indices: np.ndarray) -> "Pixels":
        """The images at `indices`."""
        return Pixels(self.images[indices], [self.labels[i] for i in indices])


def divide(task: str, folder: Path, seed: int) -> Division:
    """Read a task's unpacked archives and divide its images.

    Args:
        task: of VTAB-1k.
        folder: of the unpacked archives.
        seed: of the draws.

    Raises:
        DataError: files are missing or malformed, or there are too few images.
    """
    return SOURCES[task](folder, seed)


def _cifar(folder: Path, seed: int) -> Division:
    """Records of coarse label, fine label, and 3 x 32 x 32 values."""

    def read(name: str) -> Pixels:
        content = _find(folder, name).read_bytes()
        if not content or len(content) % 3074:
            raise DataError(f"{name} holds {len(content):,} bytes, not records of 3,074")
        records = np.frombuffer(content, np.uint8).reshape(-1, 3074)
        return Pixels(records[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 1])

    return _last_tenth(read("train.bin"), read("test.bin"), seed)


def _svhn(folder: Path, seed: int) -> Division:
    """Arrays X (32, 32, 3, n) and y (n, 1), in which 10 is the digit 0."""

    def read(name: str) -> Pixels:
        content = matlab(folder / name)
        return Pixels(content["X"].transpose(3, 0, 1, 2), content["y"].ravel() % 10)

    return _last_tenth(read("train_32x32.mat"), read("test_32x32.mat"), seed)


def _dtd(folder: Path, seed: int) -> Division:
    """The first of ten published divisions; labels in the order of the class names."""
    root = _find(folder, "labels/train1.txt").parents[1]
    classes = sorted(path.name for path in (root / "images").iterdir() if path.is_dir())

    def read(split: str) -> ImageFiles:
        paths = lines(root / "labels" / f"{split}1.txt")
        return _files(root / "images", [(path, classes.index(path.partition("/")[0])) for path in paths])

    return _official(read("train"), read("val"), read("test"), seed)


def _flowers(folder: Path, seed: int) -> Division:
    """`imagelabels.mat`: classes from 1; `setid.mat`: image numbers from 1 of the three splits."""
    labels = matlab(folder / "imagelabels.mat")["labels"].ravel()
    numbers = matlab(folder / "setid.mat")
    images = _find(folder, "image_00001.jpg").parent

    def read(key: str) -> ImageFiles:
        chosen = numbers[key].ravel()
        return _files(images, [(f"image_{number:05d}.jpg", int(labels[number - 1]) - 1) for number in chosen])

    return _official(read("trnid"), read("valid"), read("tstid"), seed)


def _pets(folder: Path, seed: int) -> Division:
    """`annotations/{trainval,test}.txt`: image, class from 1, species, breed."""
    root = _find(folder, "trainval.txt").parents[1]

    def read(split: str) -> ImageFiles:
        rows = [line.split() for line in lines(root / "annotations" / f"{split}.txt") if line[0] != "#"]
        return _files(root / "images", [(f"{name}.jpg", int(label) - 1) for name, label, *_ in rows])

    pool = read("trainval")
    order = permutation(len(pool), seed)
    cut = len(pool) * 8 // 10
    return _drawn(
        pool.subset(order[:cut]),
        pool.subset(order[cut:]),
        read("test"),
        "official test images; 80 % of the official training images to train on, 20 % to select on, drawn",
        True,
    )


def _caltech(folder: Path, seed: int) -> Division:
    """30 images of each of the 102 folders to train on, as TFDS has it; the last tenth of them to select on."""
    inner = next(iter(folder.rglob("101_ObjectCategories.tar.gz")), None)
    if inner is not None:
        unpack(inner, inner.parent)
    images = _find(folder, "101_ObjectCategories")
    pool = _class_folders(images)
    trained, tested = [], []
    for label in sorted(set(pool.labels)):
        members = np.flatnonzero(np.array(pool.labels) == label)
        members = members[permutation(len(members), seed + label)]
        trained += members[:30].tolist()
        tested += members[30:].tolist()
    train = pool.subset(np.array(trained)[permutation(len(trained), seed)])
    cut = len(train) * 9 // 10
    rule = "30 images of each class to train on, the last tenth of them to select on, the others to test on, drawn"
    return _drawn(
        train.subset(np.arange(cut)), train.subset(np.arange(cut, len(train))), pool.subset(np.array(tested)), rule
    )


def _sun(folder: Path, seed: int) -> Division:
    """Class folders such as a/apse/indoor, listed in `ClassName.txt`; 70, 10 and 20 % of all images."""
    root = _find(folder, "ClassName.txt").parent
    rows = [
        (str(path.relative_to(root)), label)
        for label, name in enumerate(lines(root / "ClassName.txt"))
        for path in list_images(root / name.lstrip("/"))
    ]
    return _shares(_files(root, rows), (0.7, 0.1), seed)


def _eurosat(folder: Path, seed: int) -> Division:
    """A folder for each class; 60, 20 and 20 % of all images."""
    return _shares(_class_folders(_find(folder, "AnnualCrop").parent), (0.6, 0.2), seed)


def _resisc(folder: Path, seed: int) -> Division:
    """A folder for each class; 60, 20 and 20 % of all images."""
    return _shares(_class_folders(_find(folder, "airplane").parent), (0.6, 0.2), seed)


def _clevr(label_of: Callable[[list[dict]], int]) -> Callable[[Path, int], Division]:
    """Scenes and images of the published train and val splits; test is val, the last tenth of train selects."""

    def divide_clevr(folder: Path, seed: int) -> Division:
        root = _find(folder, "CLEVR_train_scenes.json").parents[1]

        def read(split: str) -> ImageFiles:
            scenes = read_json(root / "scenes" / f"CLEVR_{split}_scenes.json")["scenes"]
            return _files(
                root / "images" / split, [(scene["image_filename"], label_of(scene["objects"])) for scene in scenes]
            )

        return _last_tenth(read("train"), read("val"), seed)

    return divide_clevr


def clevr_count(objects: list[dict]) -> int:
    """3 to 10 objects are classes 0 to 7."""
    return len(objects) - 3


def clevr_distance(objects: list[dict]) -> int:
    """The bin of the closest object's depth: the last threshold below it."""
    depth = min(each["pixel_coords"][2] for each in objects)
    return max(index for index, threshold in enumerate(CLEVR_DISTANCES) if threshold < depth)


def _dsprites(factor: str) -> Callable[[Path, int], Division]:
    """The published array; 80, 10 and 10 % of it."""

    def divide_sprites(folder: Path, seed: int) -> Division:
        order = permutation(dsprites.COUNT, seed)
        train, val, test = np.split(order, [dsprites.COUNT * 8 // 10, dsprites.COUNT * 9 // 10])
        chosen = np.concatenate([train[:TRAIN], val[:VAL], test])
        images = npz_rows(next(folder.glob("dsprites_*.npz")), "imgs", chosen) * np.uint8(255)
        column = FACTORS.index(factor)
        pool = Pixels(images, factors_of(chosen)[:, column] * 16 // FACTOR_SIZES[column])
        parts = np.split(np.arange(len(pool)), [TRAIN, TRAIN + VAL])
        return Division(*map(pool.subset, parts), "80, 10 and 10 % of the published array, drawn", False)

    return divide_sprites


def _smallnorb(column: int, divisor: int) -> Callable[[Path, int], Division]:
    """Left images; the category files' columns are instance, elevation, azimuth (0, 2, ... 34) and lighting."""

    def divide_norb(folder: Path, seed: int) -> Division:
        def read(split: str) -> Pixels:
            images = norb_matrix(next(folder.glob(f"*-{split}-dat.mat.gz")))[:, 0]
            return Pixels(images, norb_matrix(next(folder.glob(f"*-{split}-info.mat.gz")))[:, column] // divisor)

        train, test = read("training"), read("testing")
        order = permutation(len(test), seed)
        return _drawn(
            train.subset(permutation(len(train), seed)),
            test.subset(order[: len(test) // 2]),
            test.subset(order[len(test) // 2 :]),
            "official training images; half of the official test images to select on, half to test on, drawn",
        )

    return divide_norb


SOURCES: dict[str, Callable[[Path, int], Division]] = {
    "cifar": _cifar,
    "caltech101": _caltech,
    "dtd": _dtd,
    "oxford_flowers102": _flowers,
    "oxford_iiit_pet": _pets,
    "svhn": _svhn,
    "sun397": _sun,
    "eurosat": _eurosat,
    "resisc45": _resisc,
    "clevr_count": _clevr(clevr_count),
    "clevr_dist": _clevr(clevr_distance),
    "dsprites_loc": _dsprites("posX"),
    "dsprites_ori": _dsprites("orientation"),
    "smallnorb_azi": _smallnorb(2, 2),
    "smallnorb_ele": _smallnorb(1, 1),
}


def _drawn(train: Source, val: Source, test: Source, rule: str, official_test: bool = False) -> Division:
    """The first 800 and 200 of pools that are in a drawn order."""
    if len(train) < TRAIN or len(val) < VAL:
        raise DataError(
            f"the archive has {len(train):,} images to train on and {len(val):,} to select on, not {TRAIN} and {VAL}"
        )
    return Division(train.subset(np.arange(TRAIN)), val.subset(np.arange(VAL)), test, rule, official_test)


def _last_tenth(train: Source, test: Source, seed: int) -> Division:
    order = permutation(len(train), seed)
    cut = len(train) * 9 // 10
    rule = "official test images; 90 % of the official training images to train on, 10 % to select on, drawn"
    return _drawn(train.subset(order[:cut]), train.subset(order[cut:]), test, rule, True)


def _official(train: Source, val: Source, test: Source, seed: int) -> Division:
    rule = "official splits; 800 of the training and 200 of the validation images, drawn"
    parts = [part.subset(permutation(len(part), seed)) for part in (train, val)]
    return _drawn(*parts, test, rule, True)


def _shares(pool: Source, shares: tuple[float, float], seed: int) -> Division:
    order = permutation(len(pool), seed)
    train, val = (round(len(pool) * share) for share in np.cumsum(shares))
    parts = [pool.subset(part) for part in np.split(order, [train, val])]
    percent = [round(100 * share) for share in (*shares, 1 - sum(shares))]
    return _drawn(*parts, f"{percent[0]}, {percent[1]} and {percent[2]} % of all images, drawn")


def _files(folder: Path, rows: Sequence[tuple[str, int]]) -> ImageFiles:
    source = ImageFiles([folder / path for path, _ in rows], [label for _, label in rows])
    source.check_exist()
    return source


def _class_folders(folder: Path) -> ImageFiles:
    """Labels in the order of the folders' names."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._")
    rows = [(path, label) for label, name in enumerate(names) for path in list_images(folder / name)]
    return ImageFiles([path for path, _ in rows], [label for _, label in rows])


def _find(folder: Path, path: str) -> Path:
    """A file or folder somewhere below, known by the end of its path."""
    found = sorted(folder.rglob(path), key=lambda each: (len(each.parts), each))
    if not found:
        raise DataError(f"the archive has no {path}")
    return found[0]
