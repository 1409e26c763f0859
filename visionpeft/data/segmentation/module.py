"""What all data sets of images with masks share: crops, whole images to measure, the written record."""

from visionpeft.data.labels import Labels
from visionpeft.data.segmentation.dataset import MaskedDataset
from visionpeft.data.segmentation.masks import palette_of
from visionpeft.data.segmentation.sources import MaskSet
from visionpeft.data.segmentation.squares import SquaresDataModule
from visionpeft.data.segmentation.transforms import MaskedTransform, check_sizes
from visionpeft.errors import ConfigurationError


class SegmentationDataModule(SquaresDataModule):
    """Images with a class for each pixel, in a train split and, where there are any, a val and a test split.

    Loaders, order, resuming and normalisation are those of images. Training batches are squares of `size` pixels cut
    out of images resized at random; to measure, the shorter side of an image becomes `test_size`, its mask keeps its
    size.

    Args:
        images: splits of images with masks, class names and what is to be recorded about them.
        palette: colour (red, green, blue) of each class in figures and predicted masks; Pascal VOC's when absent.
        test_size: pixels of the shorter side of images in val and test, and of those that are predicted; `size` when
            absent.
        kwargs: as of every `SquaresDataModule`.
    """

    def __init__(
        self,
        images: MaskSet,
        *,
        palette: list[list[int]] | None = None,
        test_size: int | None = None,
        **kwargs,
    ):
        if palette is not None and len(palette) != len(images.class_names):
            raise ConfigurationError(f"palette has {len(palette)} colours for {len(images.class_names)} classes")
        super().__init__(images, **kwargs)
        check_sizes(test_size, self.scale)
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
