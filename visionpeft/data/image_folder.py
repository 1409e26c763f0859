"""People's own images in a folder for each class."""

from collections.abc import Callable
from pathlib import Path

from visionpeft.data.images import list_images
from visionpeft.data.module import ImageDataModule
from visionpeft.data.ordering import permutation
from visionpeft.data.records import ImageFiles, ImageSet
from visionpeft.data.transforms import Augmentation, Resize
from visionpeft.errors import ConfigurationError, DataError

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


class ImageFolder(ImageDataModule):
    """A folder for each class: `root/{train,val,test}/<class>/`, or `root/<class>/` which is split at random.

    The class names are the folder names, sorted. In the first layout `val` and `test` may be absent. In the second the
    images of each class are split by the fractions, at least one staying in the train split.

    Args:
        root: The folder.
        val_fraction: Share of each class held out for selection, where the folder has no splits.
        test_fraction: Share of each class held out for the test, where the folder has no splits.
        split_seed: Seed of that split; the split depends on the sorted file names and on this alone.
        resize: "squash" to the input size, or "crop": resize to cover, then cut.
        augmentation: Of training images: "none", "crop_flip" or "random_resized_crop".

    Raises:
        DataError: a folder that is missing or empty, one class only, or a class without training images.
    """

    def __init__(
        self,
        root: str | Path,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        resize: Resize = "crop",
        augmentation: Augmentation = "crop_flip",
        **kwargs,
    ):
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"image folder {root} does not exist")
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise ConfigurationError(
                f"val_fraction {val_fraction} and test_fraction {test_fraction} must not be negative and sum below 1"
            )
        given = {
            split: next((root / name for name in names if (root / name).is_dir()), None)
            for split, names in SPLIT_FOLDERS.items()
        }
        if given["train"]:
            images = {split: class_files(folder) for split, folder in given.items() if folder}
            division = "folders"
        else:
            images = divided(class_files(root), val_fraction, test_fraction, split_seed)
            division = f"random, val {val_fraction:g}, test {test_fraction:g}, seed {split_seed}"
        class_names = sorted(set().union(*images.values()))
        sources = {split: _labelled(classes, class_names) for split, classes in images.items()}
        about = {
            "dataset": "ImageFolder",
            "task": root.resolve().name,
            "trained_on": "train",
            "selected_on": "val" if "val" in sources else None,
            "split": division,
        }
        super().__init__(ImageSet(sources, class_names, about), resize=resize, augmentation=augmentation, **kwargs)


def class_files(
    folder: Path, find: Callable[[Path], list[Path]] = list_images, kind: str = "image"
) -> dict[str, list[Path]]:
    """Images of each class folder, or whatever `find` finds there and messages call `kind`.

    Raises:
        DataError: no class folders, or one without images.
    """
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"{kind} folder {folder} holds no class folders; {kind}s must lie in {folder}/<class>/")
    classes = {path.name: find(path) for path in folders}
    for name, images in classes.items():
        if not images:
            raise DataError(f"class folder {folder / name} holds no {kind}s")
    return classes


def divided(
    classes: dict[str, list[Path]], val_fraction: float, test_fraction: float, seed: int, kind: str = "image"
) -> dict[str, dict[str, list[Path]]]:
    """Split each class at random; splits of share 0 are left out.

    Raises:
        DataError: a split with a share above 0 gets nothing of any class.
    """
    splits: dict[str, dict[str, list[Path]]] = {"train": {}, "val": {}, "test": {}}
    for number, (name, images) in enumerate(classes.items()):
        order = [images[i] for i in permutation(len(images), seed + number)]
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


def _labelled(classes: dict[str, list[Path]], class_names: list[str]) -> ImageFiles:
    pairs = [(path, class_names.index(name)) for name, paths in classes.items() for path in paths]
    return ImageFiles([path for path, _ in pairs], [label for _, label in pairs])
