"""What all data sets of images with objects share: crops, whole images to measure, the written record."""

from visionpeft.data.detection.dataset import ObjectDataset
from visionpeft.data.detection.objects import ObjectSet
from visionpeft.data.detection.transforms import ObjectTransform
from visionpeft.data.labels import Labels
from visionpeft.data.segmentation.masks import palette_of
from visionpeft.data.segmentation.squares import SquaresDataModule


class DetectionDataModule(SquaresDataModule):
    """Images with boxes, and masks if there are any, in a train split and, where there are any, a val and a test split.

    Loaders, order, resuming and normalisation are those of images. Training batches are squares of `size` pixels cut
    out of images resized at random; to measure, the shorter side of an image becomes `size`, and what is found is
    compared in the image's own pixels.

    Args:
        images: splits of images with objects, class names and what is to be recorded about them.
        category_ids: the number of each class in files of results; from 1 on when absent.
        kwargs: as of every `SquaresDataModule`.
    """

    def __init__(
        self,
        images: ObjectSet,
        *,
        category_ids: list[int] | None = None,
        **kwargs,
    ):
        super().__init__(images, **kwargs)
        self.palette = palette_of(len(self.class_names) + 1)[1:]  # a colour for each class, none of them black
        self.category_ids = category_ids or list(range(1, len(self.class_names) + 1))

    @property
    def labels(self) -> Labels:
        """What a label is: the objects of an image."""
        return "objects"

    @property
    def with_masks(self) -> bool:
        """Whether the objects have masks."""
        return all(source.with_masks for source in self.sources.values())

    def dataset(self, split: str) -> ObjectDataset:
        """The images of "train" (cut and augmented), "val" or "test" with their objects.

        Raises:
            DataError: there is no such split.
            ConfigurationError: `preprocessing` was not set.
        """
        self._check_ready(split)
        transform = ObjectTransform(self.preprocessing, self.side, self.scale, self.flip, self.distort)
        return ObjectDataset(self.sources[split], transform, trains=split == "train", seed=self._seed())

    def _treatment(self) -> dict[str, object]:
        """Entries of the description on what is done to images before they are normalised."""
        return super()._treatment() | {"palette": self.palette, "category_ids": self.category_ids}
