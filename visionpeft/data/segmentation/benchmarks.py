"""Pascal VOC 2012, ADE20K and Cityscapes, as their owners distribute them."""

from pathlib import Path

import numpy as np

from visionpeft.data.images import list_images
from visionpeft.data.ordering import permutation
from visionpeft.data.segmentation.masks import MaskReader, ShiftedReader
from visionpeft.data.segmentation.module import SegmentationDataModule
from visionpeft.data.segmentation.sources import MaskFiles, MaskSet
from visionpeft.errors import DataError

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
ADE20K_CLASSES = 150
CITYSCAPES_ROWS = 1024
HELD_OUT = 0.05  # of the training images, for selection: what is published as validation is the test


class VOCSegmentation(SegmentationDataModule):
    """Pascal VOC 2012: 20 classes of objects and background, 1,464 training and 1,449 validation images.

    Everingham et al. 2010, "The Pascal Visual Object Classes (VOC) Challenge". The published validation split is the
    test here, and a part of the training split is held out for selection. Pixels of value 255, the borders of objects,
    count nowhere. With `aug` the training images are the 10,582 that papers call trainaug: those of VOC with VOC's
    masks, and all others of SBD (Hariharan et al. 2011) that are not in the validation split.

    Args:
        root: the folder that holds VOCdevkit/VOC2012, which torchvision reads.
        aug: train on the masks of SBD as well.
        sbd: the folder of SBD with img/, cls/, train.txt and val.txt (benchmark_RELEASE/dataset), whose masks are files
            of MATLAB; when absent, masks are taken from VOC2012/SegmentationClassAug, PNG files that many hand on.
        val_fraction: share of the training images held out for selection; 0 for none.
        split_seed: seed of that.

    Raises:
        DataError: a folder or a list is missing.
    """

    def __init__(
        self,
        root: str | Path,
        aug: bool = False,
        sbd: str | Path | None = None,
        val_fraction: float = HELD_OUT,
        split_seed: int = 0,
        **kwargs,
    ):
        if sbd is not None and not aug:
            raise DataError("sbd is for aug; set --data.aug true to train on its masks as well")
        reader = _SBDReader(VOC_CLASSES)
        train, test = (_voc(Path(root), split) for split in ("train", "val"))
        if aug:
            known = {image.stem for image, _ in [*train, *test]}
            images = Path(root) / "VOCdevkit" / "VOC2012" / "JPEGImages"
            train += [(image, mask) for image, mask in _augmented(images, sbd) if image.stem not in known]
        sources = _held_out(train, val_fraction, split_seed, reader)
        sources["test"] = _files(test, reader)
        about = {"dataset": "VOC2012", "task": "voc2012_aug" if aug else "voc2012", **_selection(sources)}
        super().__init__(MaskSet(sources, list(VOC_CLASSES), about), **kwargs)


class ADE20K(SegmentationDataModule):
    """ADE20K as SceneParse150: 150 classes, 20,210 training and 2,000 validation images.

    Zhou et al. 2017, "Scene Parsing through ADE20K Dataset". The published validation split is the test here, and a
    part of the training split is held out for selection. In masks 0 is what has none of the classes and counts nowhere,
    and number i is class i - 1.

    Args:
        root: the folder ADEChallengeData2016, or the one that holds it. Class names are read from objectInfo150.txt.
        val_fraction: share of the training images held out for selection; 0 for none.
        split_seed: seed of that.

    Raises:
        DataError: a folder or the list of classes is missing, or an image has no mask.
    """

    def __init__(self, root: str | Path, val_fraction: float = HELD_OUT, split_seed: int = 0, **kwargs):
        root = Path(root)
        inside = root / "ADEChallengeData2016"
        root = inside if inside.is_dir() else root
        names = _ade20k_names(root / "objectInfo150.txt")
        reader = ShiftedReader(names, ignore=None)
        pairs = {}
        for split in ("training", "validation"):
            folder = root / "images" / split
            if not folder.is_dir():
                raise DataError(f"there is no folder {folder}; root must be ADEChallengeData2016")
            masks = root / "annotations" / split
            pairs[split] = [(image, masks / f"{image.stem}.png") for image in list_images(folder)]
        sources = _held_out(pairs["training"], val_fraction, split_seed, reader)
        sources["test"] = _files(pairs["validation"], reader)
        about = {"dataset": "ADE20K", "task": "ade20k", **_selection(sources)}
        super().__init__(MaskSet(sources, names, about), **kwargs)


class Cityscapes(SegmentationDataModule):
    """Cityscapes: 19 classes of street scenes, 2,975 training and 500 validation images of 2048 x 1024 pixels.

    Cordts et al. 2016, "The Cityscapes Dataset for Semantic Urban Scene Understanding". The published validation split
    is the test here, as the masks of the published test split are not, and a part of the training split is held out
    for selection. Masks are `*_gtFine_labelIds.png` as downloaded: of their 34 numbers 19 are classes, in the order of
    the train ids, and the others count nowhere. To measure, images keep their 1024 rows unless `test_size` says other.

    Args:
        root: the folder that holds leftImg8bit and gtFine, which torchvision reads.
        val_fraction: share of the training images held out for selection; 0 for none.
        split_seed: seed of that.
        test_size: pixels of the shorter side in val and test.

    Raises:
        DataError: a folder is missing, or holds no images.
    """

    def __init__(
        self,
        root: str | Path,
        val_fraction: float = HELD_OUT,
        split_seed: int = 0,
        test_size: int | None = CITYSCAPES_ROWS,
        **kwargs,
    ):
        from torchvision.datasets import Cityscapes as CityscapesFiles  # which brings all of torchvision's data sets

        classes = sorted((c for c in CityscapesFiles.classes if not c.ignore_in_eval), key=lambda c: c.train_id)
        names = [each.name for each in classes]
        numbers = {each.id: None for each in CityscapesFiles.classes} | {each.id: each.name for each in classes}
        reader = MaskReader(names, values=numbers)
        sources = _held_out(_cityscapes(Path(root), "train"), val_fraction, split_seed, reader)
        sources["test"] = _files(_cityscapes(Path(root), "val"), reader)
        about = {"dataset": "Cityscapes", "task": "cityscapes", **_selection(sources)}
        kwargs.setdefault("palette", [list(each.color) for each in classes])
        super().__init__(MaskSet(sources, names, about), test_size=test_size, **kwargs)


class _SBDReader(MaskReader):
    """Masks of VOC, and of SBD as MATLAB files."""

    def read(self, path: Path) -> np.ndarray:
        if path.suffix != ".mat":
            return super().read(path)
        try:
            from scipy.io import loadmat  # for these files alone
        except ModuleNotFoundError as error:
            raise DataError(f"reading {path} needs SciPy; install it with pip install scipy") from error
        try:
            pixels = loadmat(path)["GTcls"][0]["Segmentation"][0].astype(np.int64)
        except Exception as error:  # a dozen types, on damaged files
            raise DataError(f"mask file {path} cannot be read ({error})") from error
        return self._classes(pixels, path)


def _voc(root: Path, split: str) -> list[tuple[Path, Path]]:
    from torchvision.datasets import VOCSegmentation as VOCFiles  # which brings all of torchvision's data sets

    try:
        files = VOCFiles(root, year="2012", image_set=split)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{root} holds no VOCdevkit/VOC2012 with JPEGImages, SegmentationClass and ImageSets/Segmentation ({error})"
        ) from error
    return [(Path(image), Path(mask)) for image, mask in zip(files.images, files.masks, strict=True)]


def _cityscapes(root: Path, split: str) -> list[tuple[Path, Path]]:
    from torchvision.datasets import Cityscapes as CityscapesFiles

    for kind in ("leftImg8bit", "gtFine"):
        if not (root / kind / split).is_dir():  # before torchvision, which would unpack archives that it finds there
            raise DataError(
                f"there is no folder {root / kind / split}; root must hold leftImg8bit and gtFine, unpacked from "
                "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip"
            )
    files = CityscapesFiles(root, split=split, mode="fine", target_type="semantic")
    pairs = [(Path(image), Path(masks[0])) for image, masks in zip(files.images, files.targets, strict=True)]
    if not pairs:
        raise DataError(f"{root / 'leftImg8bit' / split} holds no folder of a city with images in it")
    return sorted(pairs)  # torchvision lists them as the file system does


def _augmented(images: Path, sbd: str | Path | None) -> list[tuple[Path, Path]]:
    if sbd is None:
        folder = images.parent / "SegmentationClassAug"
        if not folder.is_dir():
            raise DataError(
                f"aug needs the masks of SBD: give its folder with --data.sbd, or put PNG masks in {folder}"
            )
        return [(images / f"{mask.stem}.jpg", mask) for mask in list_images(folder)]
    lists = [Path(sbd) / f"{split}.txt" for split in ("train", "val")]
    if missing := [each for each in lists if not each.is_file()]:
        raise DataError(f"there is no list {missing[0]}; sbd must be the folder benchmark_RELEASE/dataset")
    names = [name for each in lists for name in each.read_text().split()]
    return [(Path(sbd) / "img" / f"{name}.jpg", Path(sbd) / "cls" / f"{name}.mat") for name in sorted(names)]


def _ade20k_names(path: Path) -> list[str]:
    """The last column of objectInfo150.txt, all names of a class."""
    if not path.is_file():
        raise DataError(f"there is no {path}, which names the classes; it comes with ADEChallengeData2016")
    names = [line.split("\t")[-1].strip() for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
    if len(names) != ADE20K_CLASSES:
        raise DataError(f"{path} names {len(names)} classes, not {ADE20K_CLASSES}")
    return names


def _held_out(pairs: list[tuple[Path, Path]], share: float, seed: int, reader: MaskReader) -> dict[str, MaskFiles]:
    if not 0 <= share < 1:
        raise DataError(f"val_fraction {share} must be from 0 to below 1")
    order = permutation(len(pairs), seed)
    count = round(len(pairs) * share)
    chosen = {"train": sorted(order[count:]), "val": sorted(order[:count])}
    return {split: _files([pairs[i] for i in indices], reader) for split, indices in chosen.items() if len(indices)}


def _files(pairs: list[tuple[Path, Path]], reader: MaskReader) -> MaskFiles:
    return MaskFiles([image for image, _ in pairs], [mask for _, mask in pairs], reader)


def _selection(sources: dict[str, MaskFiles]) -> dict[str, str | None]:
    return {"trained_on": "train", "selected_on": "val" if "val" in sources else None, "tested_on": "published val"}
