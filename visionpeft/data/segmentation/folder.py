"""People's own images and masks in folders."""

from collections.abc import Sequence
from pathlib import Path

from visionpeft.data.class_folders import SPLIT_FOLDERS
from visionpeft.data.images import list_images
from visionpeft.data.ordering import permutation
from visionpeft.data.segmentation.masks import MaskReader
from visionpeft.data.segmentation.module import SegmentationDataModule
from visionpeft.data.segmentation.sources import MaskFiles, MaskSet
from visionpeft.errors import ConfigurationError, DataError


class MaskFolder(SegmentationDataModule):
    """Images in `root/images` and their masks in `root/masks`, under the same names but for the ending.

    With folders of splits in both (`images/train`, `masks/train`, ..., in any case, also `training`, `valid`,
    `validation`, `dev`, `testing`), or in the root (`train/images`, `train/masks`, ...), those are taken; otherwise the
    images are divided at random. In a palette PNG the index is the class, whatever its colour; gray levels may have 8
    or 16 bits; colours need `colours`. Every image must have a mask of its size, or with `skip_corrupt` is left out;
    masks without an image are counted in the description of a run, as are such images.

    Args:
        root: the folder.
        classes: names of the classes in the order of the masks' values, or a text file with one a line.
        ignore: value of pixels that count nowhere, with `colours` their colour; null for none. Without `values` and
            `colours` it must not be the value of a class, as 255 is of more than 255 classes.
        values: class of each value of the masks by name, null to ignore it: `{0: background, 255: road}`. Several
            values may be one class, and any other is refused. By default value i is class i.
        colours: colour of each class by name, [red, green, blue] or a list of several, for masks in colours.
        suffix: what the names of masks have after those of the images, such as `_mask`.
        images: name of the folder of images.
        masks: name of the folder of masks.
        val_fraction: share held out for selection, where the folder has no splits.
        test_fraction: share held out for the test, where the folder has no splits.
        split_seed: seed of that split; it depends on the sorted file names and on this alone.

    Raises:
        DataError: a folder that is missing or empty, an image without a mask, or two images with one.
        ConfigurationError: values or colours of classes that there are not, or fractions that leave nothing to train.
    """

    def __init__(
        self,
        root: str | Path,
        classes: list[str] | str,
        ignore: int | list[int] | None = 255,
        values: dict[int, str | int | None] | None = None,
        colours: dict[str, list] | None = None,
        suffix: str = "",
        images: str = "images",
        masks: str = "masks",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        **kwargs,
    ):
        root = Path(root)
        if not root.is_dir():
            what = "is a file; give the folder that holds both" if root.is_file() else "does not exist"
            raise DataError(f"folder {root} of images and masks {what}")
        names = class_list(classes)
        reader = MaskReader(names, ignore, values, colours)
        skips = bool(kwargs.get("skip_corrupt"))
        pairs, notes, division = _splits(root, images, masks, suffix, (val_fraction, test_fraction, split_seed), skips)
        sources = {
            split: MaskFiles([image for image, _ in found], [mask for _, mask in found], reader)
            for split, found in pairs.items()
        }
        about = {
            "dataset": "MaskFolder",
            "task": root.resolve().name,
            "trained_on": "train",
            "selected_on": "val" if "val" in sources else None,
            "split": division,
        }
        if kwargs.get("palette") is None:
            kwargs["palette"] = reader.palette
        super().__init__(MaskSet(sources, names, about, notes), **kwargs)


Pairs = list[tuple[Path, Path]]


def class_list(classes: Sequence[str] | str) -> list[str]:
    """Names as a list, or the lines of a text file.

    Raises:
        DataError: the file is missing or not text, or a name comes twice.
    """
    if isinstance(classes, str):
        try:
            lines = Path(classes).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError):
            raise DataError(f"classes {classes!r} is neither a list of names nor a text file with one a line") from None
        classes = [line.strip() for line in lines if line.strip()]
    if twice := [name for name in classes if list(classes).count(name) > 1]:
        raise DataError(f"class {twice[0]!r} is named twice")
    return list(classes)


def _splits(
    root: Path, images: str, masks: str, suffix: str, fractions: tuple[float, float, int], skips: bool
) -> tuple[dict[str, Pairs], list[str], str]:
    """Pairs of each split, remarks on masks without images, and how it was split."""
    in_root = {split: folder for split in SPLIT_FOLDERS if (folder := _of_split(root, split)) is not None}
    if in_root and not (root / images).is_dir():
        places = {split: (folder / images, folder / masks) for split, folder in in_root.items()}
    else:
        for name in (images, masks):
            if not (root / name).is_dir():
                raise DataError(
                    f"{root} has no folder {name}/; images must lie in {root / images}, their masks in {root / masks}"
                )
        inside = {split: folder for split in SPLIT_FOLDERS if (folder := _of_split(root / images, split)) is not None}
        places = {split: (folder, root / masks / folder.name) for split, folder in inside.items()}
    if not places:
        pairs, notes = _pairs(root / images, root / masks, suffix, skips)
        return _divided(pairs, *fractions), notes, "random, val {:g}, test {:g}, seed {}".format(*fractions)
    if "train" not in places:
        raise DataError(f"{root} holds {' and '.join(places)}, which are splits, and no train folder to train on")
    found = {split: _pairs(*place, suffix, skips) for split, place in places.items()}
    notes = [note for _, of_split in found.values() for note in of_split]
    return {split: pairs for split, (pairs, _) in found.items()}, notes, "folders"


def _of_split(folder: Path, split: str) -> Path | None:
    found = [
        path for path in sorted(folder.iterdir()) if path.is_dir() and path.name.casefold() in SPLIT_FOLDERS[split]
    ]
    if len(found) > 1:
        raise DataError(f"{folder} is ambiguous: {' and '.join(p.name for p in found)} both name the {split} split")
    return found[0] if found else None


def _pairs(images: Path, masks: Path, suffix: str, skips: bool) -> tuple[Pairs, list[str]]:
    """Each image with its mask, and remarks on masks without an image and on skipped images without a mask."""
    for folder in (images, masks):
        if not folder.is_dir():
            raise DataError(f"folder {folder} does not exist")
    found = list_images(images)
    if not found:
        raise DataError(f"folder {images} holds no images")
    by_name: dict[str, Path] = {}
    for mask in list_images(masks):
        name = mask.relative_to(masks).with_suffix("").as_posix()
        if (other := by_name.setdefault(name, mask)) != mask:
            raise DataError(f"{other} and {mask} would both be the mask of one image; leave one")
    of_mask: dict[str, Path] = {}
    for image in found:
        name = image.relative_to(images).with_suffix("").as_posix() + suffix
        if (other := of_mask.setdefault(name, image)) != image:
            raise DataError(f"images {other} and {image} would both have the mask {masks / name}; leave one of them")
    missing = [name for name in of_mask if name not in by_name]
    more = f" ({len(missing)} of {len(found)} images have none)" if len(missing) > 1 else ""
    if missing and (len(missing) == len(found) or not skips):
        raise DataError(
            f"image {of_mask[missing[0]]} has no mask {masks / missing[0]}.png, nor of another ending{more}; add it, "
            "or set skip_corrupt to leave out images without one"
        )
    notes = []
    if left := [mask for name, mask in by_name.items() if name not in of_mask]:
        notes.append(f"{len(left)} masks in {masks} are left out, as they have no image: {left[0]}, ...")
    if missing:
        notes.append(
            f"{len(missing)} images in {images} are left out, as they have no mask: {of_mask[missing[0]]}, ..."
        )
    return [(image, by_name[name]) for name, image in of_mask.items() if name in by_name], notes


def _divided(pairs: Pairs, val: float, test: float, seed: int) -> dict[str, Pairs]:
    if min(val, test) < 0 or val + test >= 1:
        raise ConfigurationError(f"val_fraction {val} and test_fraction {test} must not be negative and sum below 1")
    order = [pairs[index] for index in permutation(len(pairs), seed)]
    tests, vals = round(len(order) * test), round(len(order) * val)
    splits = {"train": order[tests + vals :], "val": order[tests : tests + vals], "test": order[:tests]}
    for split, share in (("train", 1), ("val", val), ("test", test)):
        if share and not splits[split]:
            raise DataError(
                f"{len(pairs)} images are too few for a {split} split; add images, or change val_fraction and "
                "test_fraction (0 leaves the split out)"
            )
    return {split: sorted(found) for split, found in splits.items() if found}
