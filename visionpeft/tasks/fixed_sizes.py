"""Backbones that take images of one size, and what is measured of other sizes: told before an epoch is trained."""

import math

import lightning.pytorch as pl

from visionpeft.data import ImageDataModule
from visionpeft.errors import ConfigurationError
from visionpeft.models.dense_predictor import DensePredictor
from visionpeft.models.feature_maps import only_size
from visionpeft.models.object_detector import ObjectDetector


def check_measured_sizes(
    model: DensePredictor | ObjectDetector, trainer: pl.Trainer, window: int | None = None
) -> None:
    """Refuse to train where the first image of the val split is of a size that the backbone does not take.

    Training squares may be of its size while whole images are not, which otherwise the first measurement would say,
    when an epoch is over.

    Args:
        model: what will be trained.
        trainer: what trains it; other data modules than the package's own are not looked at.
        window: height and width of the windows of a `DensePredictor`, None for whole images.

    Raises:
        ConfigurationError: it is.
    """
    size, datamodule = only_size(model.backbone), trainer.datamodule
    if size is None or not isinstance(datamodule, ImageDataModule) or "val" not in datamodule.sources:
        return
    if not trainer.limit_val_batches:
        return
    segments = isinstance(model, DensePredictor)
    patch = model.patch_size if segments else (model.patch, model.patch)
    image, _ = datamodule.dataset("val")[0]
    seen = [min(side, window or side) for side in image.shape[-2:]]
    if tuple(math.ceil(side / each) * each for side, each in zip(seen, patch, strict=True)) == size:
        return
    remedy = "take a backbone that takes images of any size"
    if segments and size[0] == size[1] <= min(image.shape[-2:]):
        remedy = f"measure in windows of its own size (--model.window {size[0]}), or {remedy}"
    raise ConfigurationError(
        f"the backbone takes images of {size[0]} x {size[1]} pixels alone, and {datamodule.sources['val'].name(0)} of "
        f"the val split is seen in {seen[0]} x {seen[1]}; {remedy}"
    )
