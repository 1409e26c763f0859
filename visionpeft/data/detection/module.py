"""What all data sets of images with objects share: crops, whole images to measure, the written record."""

from typing import Literal

from visionpeft.data.detection.dataset import ObjectDataset
from visionpeft.data.detection.objects import ObjectSet
from visionpeft.data.detection.transforms import ObjectTransform
from visionpeft.data.labels import Labels
from visionpeft.data.segmentation.masks import palette_of
from visionpeft.data.segmentation.squares import SquaresDataModule

SCALE = (0.5, 2.0)


class DetectionDataModule(SquaresDataModule):
    """Images with boxes, and masks if there are any, in a train split and, where there are any, a val and a test split.

    Loaders, order, resuming and normalisation are those of images. Training batches are squares of `size` pixels cut
    out of images resized at random; to measure, the shorter side of an image becomes `size`, and what is found is
    compared in the image's own pixels.

    Args:
        images: splits of images with objects, class names and what is to be recorded about them.
        size: pixels of a training square, and of the shorter side in val and test; the backbone's own when absent.
        scale: smallest and largest factor by which the shorter side of a training image is resized, beside `size`.
        flip: mirror half of the training images.
        distort: change brightness, contrast, saturation and hue of training images.
        batch_size: images in a training batch.
        num_workers: processes that load images; 0 loads in the main process.
        normalisation: "pretrained" (the backbone's), "imagenet", "half" (mean and std 0.5) or "none".
        drop_last: leave out the last incomplete training batch of each epoch.
        test_samples: score a fixed random subset of the test split, this large; all of it when absent.
        skip_corrupt: leave damaged images out (each is opened once before training, counted and reported) instead of
            stopping at the first one.
        seed: of shuffling and augmentation; the seed given to Lightning when absent.
        test_batch_size: images in a batch of the val and test splits; more than one needs images of one size.
        category_ids: the number of each class in files of results; from 1 on when absent.
    """

    def __init__(
        self,
        images: ObjectSet,
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
        category_ids: list[int] | None = None,
    ):
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
