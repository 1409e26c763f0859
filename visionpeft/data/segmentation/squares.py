"""Images of which training sees squares, cut anew in each epoch, and measuring the whole."""

from typing import Literal

from visionpeft.data.module import ImageDataModule
from visionpeft.data.records import ImageSet
from visionpeft.data.segmentation.transforms import check_sizes

SCALE = (0.5, 2.0)


class SquaresDataModule(ImageDataModule):
    """What data of masks and of objects share beside loaders, order, resuming and normalisation.

    Args:
        images: splits of images, class names and what is to be recorded about them.
        size: pixels of a training square, and, if no other is given for it, of the shorter side in val and test; the
            backbone's own when absent.
        scale: smallest and largest factor by which the shorter side of a training image is resized, beside `size`.
        flip: mirror half of the training images.
        distort: change brightness, contrast, saturation and hue of training images.
        batch_size: images in a training batch.
        num_workers: processes that load images; 0 loads in the main process.
        normalisation: "pretrained" (the backbone's), "imagenet", "half" (mean and std 0.5) or "none".
        drop_last: leave out the last incomplete training batch of each epoch.
        test_samples: score a fixed random subset of the test split, this large; all of it when absent.
        skip_corrupt: leave damaged images, and their masks, out (each is opened once before training, counted and
            reported) instead of stopping at the first one.
        seed: of shuffling and augmentation; the seed given to Lightning when absent.
        test_batch_size: images in a batch of the val and test splits; more than one needs images of one size.

    Raises:
        ConfigurationError: a size or scale that makes no sense.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        size: int | None = None,
        scale: tuple[float, float] = SCALE,
        flip: bool = True,
        distort: bool = False,
        batch_size: int = 16,
        num_workers: int = 0,
        normalisation: Literal["pretrained", "imagenet", "half", "none"] = "pretrained",
        drop_last: bool = False,
        test_samples: int | None = None,
        skip_corrupt: bool = False,
        seed: int | None = None,
        test_batch_size: int = 1,
    ):
        check_sizes(size, scale)
        super().__init__(
            images,
            batch_size=batch_size,
            num_workers=num_workers,
            normalisation=normalisation,
            drop_last=drop_last,
            cache_in_memory=False,
            test_samples=test_samples,
            skip_corrupt=skip_corrupt,
            seed=seed,
            test_batch_size=test_batch_size,
        )
        self.size = size
        self.scale = tuple(scale)
        self.flip = flip
        self.distort = distort

    @property
    def deterministic_views(self) -> None:
        """Squares are cut anew in each epoch."""
        return None

    @property
    def side(self) -> int:
        """`size`, or the smaller side of the backbone's images."""
        return min(self.preprocessing.input_size) if self.size is None else self.size

    def _treatment(self) -> dict[str, object]:
        """Entries of the description on what is done to images before they are normalised."""
        used = self.preprocessing
        return {
            "size": self.side if used else self.size,
            "scale": list(self.scale),
            "flip": self.flip,
            "distort": self.distort,
            "interpolation": used.interpolation if used else None,
        }
