"""Images of which training sees squares, cut anew in each epoch, and measuring the whole."""

from visionpeft.data.module import ImageDataModule
from visionpeft.data.segmentation.transforms import check_sizes


class SquaresDataModule(ImageDataModule):
    """What data of masks and of objects share beside loaders, order, resuming and normalisation.

    Args:
        images: the splits.
        size: pixels of a training square; the backbone's own when absent.
        scale: smallest and largest factor by which the shorter side of a training image is resized, beside `size`.
        flip: mirror half of the training images.
        distort: change brightness, contrast, saturation and hue of training images.
        loading: see `ImageDataModule`.

    Raises:
        ConfigurationError: a size or scale that makes no sense.
    """

    def __init__(
        self, images, size: int | None, scale: tuple[float, float], flip: bool, distort: bool, **loading: object
    ):
        check_sizes(size, scale)
        super().__init__(images, cache_in_memory=False, **loading)
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
