"""People's own images in a folder for each class."""

from pathlib import Path

from visionpeft.backbones.preprocessing import Resize
from visionpeft.data.class_folders import read_class_folders
from visionpeft.data.images import list_images
from visionpeft.data.labels import Written
from visionpeft.data.module import ImageDataModule
from visionpeft.data.records import ImageFiles
from visionpeft.data.transforms import Augmentation


class ImageFolder(ImageDataModule):
    """A folder for each class: `root/{train,val,test}/<class>/`, or `root/<class>/` which is split at random.

    The first layout is taken where every folder in the root that holds any has the name of a split, in any case, also
    `training`, `valid`, `validation`, `dev` and `testing`; where only some have, the folder is refused as ambiguous.
    Files that are left out are counted and named in the description of a run.

    The class names are the folder names, sorted. With `labels` "several" the name of a folder holds all labels of its
    images with the separator between them, `cat;dog/` (`;/` holds images without any), with "number" it is the number
    to learn, `0.5/`. In the first layout `val` and `test` may be absent. In the second the
    images of each class (numbers: of all folders together) are split by the fractions, at least one staying in the
    train split.

    Args:
        root: the folder.
        val_fraction: share of each class held out for selection, where the folder has no splits.
        test_fraction: share of each class held out for the test, where the folder has no splits.
        split_seed: seed of that split; the split depends on the sorted file names and on this alone.
        labels: what the name of a folder is: one of "classes", "several" of them, or a "number".
        separator: what stands between several labels.
        resize: "squash" to the input size, or "crop": resize to cover, then cut.
        augmentation: of training images: "none", "crop_flip" or "random_resized_crop".

    Raises:
        DataError: a folder that is missing or empty, one class only, or a class without training images; a name of a
            folder that is no such label.
    """

    def __init__(
        self,
        root: str | Path,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        labels: Written = "classes",
        separator: str = ";",
        resize: Resize = "crop",
        augmentation: Augmentation = "crop_flip",
        **kwargs,
    ):
        images = read_class_folders(
            *("ImageFolder", root, val_fraction, test_fraction, split_seed, ImageFiles, list_images),
            labels=labels,
            separator=separator,
        )
        super().__init__(images, resize=resize, augmentation=augmentation, **kwargs)
