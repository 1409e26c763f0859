"""What all data sets of images with masks share: crops, whole images to measure, the written record."""

from typing import Literal

from visionpeft.data.labels import Labels
from visionpeft.data.segmentation.dataset import MaskedDataset
from visionpeft.data.segmentation.masks import palette_of
from visionpeft.data.segmentation.sources import MaskSet
from visionpeft.data.segmentation.squares import SquaresDataModule
from visionpeft.data.segmentation.transforms import MaskedTransform, check_sizes
from visionpeft.errors import ConfigurationError

SCALE = (0.5, 2.0)


class SegmentationDataModule(SquaresDataModule):
    """Images with a class for each pixel, in a train split and, where there are any, a val and a test split.

    Loaders, order, resuming and normalisation are those of images. Training batches are squares of `size` pixels cut
    out of images resized at random; to measure, the shorter side of an image becomes `test_size`, its mask keeps its
    size.

    Args:
        images: splits of images with masks, class names and what is to be recorded about them.
        size: pixels of a training square; the backbone's own when absent.
        scale: smallest and largest factor by which the shorter side of a training image is resized, beside `size`.
        flip: mirror half of the training images.
        distort: change brightness, contrast, saturation and hue of training images.
        batch_size: images in a training batch.
        num_workers: processes that load images; 0 loads in the main process.
        normalisation: "pretrained" (the backbone's), "imagenet", "half" (mean and std 0.5) or "none".
        drop_last: leave out the last incomplete training batch of each epoch.
        test_samples: score a fixed random subset of the test split, this large; all of it when absent.
        skip_corrupt: leave damaged images and masks out (each is opened once before training, counted and reported)
            instead of stopping at the first one.
        seed: of shuffling and augmentation; the seed given to Lightning when absent.
        test_batch_size: images in a batch of the val and test splits; more than one needs images of one size.
        palette: colour (red, green, blue) of each class in figures and predicted masks; Pascal VOC's when absent.
        test_size: pixels of the shorter side of images in val and test, and of those that are predicted; `size` when
            absent.
    """

    def __init__(
        self,
        images: MaskSet,
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
        palette: list[list[int]] | None = None,
        test_size: int | None = None,
    ):
        check_sizes(test_size, scale)
        if palette is not None and len(palette) != len(images.class_names):
            raise ConfigurationError(f"palette has {len(palette)} colours for {len(images.class_names)} classes")
        super().__init__(
            images,
            size,
            scale,
            flip,
            distort,
            batch_size=batch_size,
            num_workers=num_workers,
            normalisation=normalisation,
            drop_last=drop_last,
            test_samples=test_samples,
            skip_corrupt=skip_corrupt,
            seed=seed,
            test_batch_size=test_batch_size,
        )
        self.test_size = test_size
        self.palette = palette or palette_of(len(self.class_names))

    @property
    def labels(self) -> Labels:
        """What a label is: a class for each pixel."""
        return "masks"

    def dataset(self, split: str) -> MaskedDataset:
        """The images of "train" (cut and augmented), "val" or "test" with their masks.

        Raises:
            DataError: there is no such split.
            ConfigurationError: `preprocessing` was not set.
        """
        self._check_ready(split)
        trains = split == "train"
        side = self.side if trains or self.test_size is None else self.test_size
        transform = MaskedTransform(self.preprocessing, side, self.scale, self.flip, self.distort)
        return MaskedDataset(self.sources[split], transform, trains=trains, seed=self._seed())

    def _treatment(self) -> dict[str, object]:
        """Entries of the description on what is done to images before they are normalised."""
        return super()._treatment() | {"test_size": self.test_size, "palette": self.palette}
