"""Semantic segmentation with a frozen, adapted backbone and a head on its maps."""

from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from visionpeft.adapters.storage import save
from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.data import ImageDataModule
from visionpeft.data.segmentation.masks import IGNORED
from visionpeft.errors import ConfigurationError, DataError
from visionpeft.heads import DenseHead, LinearSegmentation
from visionpeft.heads.mask_loss import mask_classification_loss
from visionpeft.methods import Method
from visionpeft.models.create import create_dense_backbone
from visionpeft.models.dense_predictor import DensePredictor
from visionpeft.models.strips import classes_of, cross_entropy
from visionpeft.models.windows import check_windows, window_logits
from visionpeft.tasks.adapted_task import AdaptedTask
from visionpeft.tasks.batches import images_and_labels, number_of
from visionpeft.tasks.fixed_sizes import check_measured_sizes
from visionpeft.tasks.optimisation import Optimisation
from visionpeft.tasks.segmentation_objective import ClassOfPixels

HEAD = LinearSegmentation()


class SemanticSegmentation(AdaptedTask):
    """Cross-entropy of each pixel of a `DensePredictor` with a method attached; of heads of queries, the loss of masks.

    The frozen modules stay in evaluation mode while training; adapter and head, with its batch normalisation, are in
    training mode. Batches are (images (batch, 3, height, width), class indices (batch, height, width)), where -1 counts
    nowhere; to measure, masks may have another size than images, to which the logits are then resized. Logits at the
    size of the masks are computed in strips, and again in the backward pass, as is the head.

    Args:
        method: the method, or several that are stacked in order.
        class_names: one name for each class; taken from the data.
        backbone: `nano_vit`, a timm name, or `open_clip/<model>/<tag>`; see `visionpeft.create_backbone`.
        pretrained: load the backbone's published weights.
        checkpoint: a local file with the backbone's weights (.safetensors, .pth or .npz).
        backbone_kwargs: further arguments of the library's function that creates the backbone; that it takes images of
            any size, `dynamic_img_size`, is among them where timm's model knows it.
        head: what is built on the maps of the backbone's blocks.
        train: names of further backbone parameters to train, such as "backbone.cls_token"; they travel with it.
        start: folder of a saved adapter of the same method, from whose values training starts, the head's excepted.
        drop_path: rate of the backbone's stochastic depth while training, rising linearly with depth.
        recompute: compute "mlp" (hidden activations) or "block" (all activations) again in the backward pass instead
            of keeping them; exact, for less memory.
        window: to measure, height and width of windows that slide over an image; null for the whole at once.
        stride: pixels from one window to the next; two thirds of the window when absent.
        optimisation: optimiser, learning rates and schedule.
        seed: the randomness of an epoch (dropout) is a function of the seed and the epoch.
        compile: run training steps as one graph made by `torch.compile`, which recomputes the head as it sees fit; the
            first steps take minutes. What is measured is not compiled, as images have sizes of their own.

    Raises:
        ConfigurationError: windows that do not cover an image, or `compile` with a head of queries, whose masks change
            with each step.
    """

    def __init__(
        self,
        method: Method | list[Method],
        class_names: list[str],
        backbone: str = "nano_vit",
        pretrained: bool = True,
        checkpoint: str | None = None,
        backbone_kwargs: dict | None = None,
        head: DenseHead = HEAD,
        train: list[str] | None = None,
        start: str | None = None,
        drop_path: float = 0.0,
        recompute: Literal["mlp", "block"] | None = None,
        window: int | None = None,
        stride: int | None = None,
        optimisation: Optimisation = Optimisation(),  # noqa: B008  (frozen)
        seed: int = 0,
        compile: bool = False,
    ):
        check_windows(window, stride)
        if compile and head.gives_scores:
            raise ConfigurationError(
                f"what {type(head).__name__} masks changes with each training step, of which each would be compiled; "
                "leave compile out"
            )
        objective = ClassOfPixels(len(class_names), scores=head.gives_scores)
        super().__init__(method, class_names, backbone, 0.0, optimisation, seed, objective)
        kwargs = self.backbone_arguments(backbone_kwargs, drop_path)
        torch.manual_seed(seed)
        images = create_dense_backbone(backbone, pretrained=pretrained, checkpoint=checkpoint, **kwargs)
        self.preprocessing = preprocessing_of(images)
        self.window, self.stride = window, stride
        self.head = head
        self.model = DensePredictor(images, head, class_names)
        self.adapt(train, start, recompute=recompute)
        self.side = min(self.preprocessing.input_size)
        if compile:
            self.compile_model()

    def connect(self, datamodule: pl.LightningDataModule) -> None:
        """Tell the data how this backbone wants its images.

        Raises:
            ConfigurationError: the data has no masks.
        """
        super().connect(datamodule)
        if isinstance(datamodule, ImageDataModule):
            self.side = datamodule.side

    def check_before_training(self, datamodule: pl.LightningDataModule, processes: int = 1) -> None:
        """As for every task; and see that a pixel to train on has a class.

        Raises:
            DataError: all pixels of all training masks are ignored.
        """
        source = getattr(datamodule, "sources", {}).get("train", ())
        # As a rule the first mask says it.
        if len(source) and all((source.mask(index) == IGNORED).all() for index in range(len(source))):
            raise DataError(
                f"no pixel of the {len(source)} training masks has a class, all are ignored, so that there is nothing "
                "to learn; see what the values of their masks mean (--data.values, --data.ignore)"
            )
        super().check_before_training(datamodule, processes)

    def on_fit_start(self) -> None:
        """As for every task; and see that what will be measured is of a size that the backbone takes."""
        super().on_fit_start()
        check_measured_sizes(self.model, self.trainer, self.window)

    def example(self) -> Tensor:
        """A batch of one training image, of zeros."""
        return torch.zeros(1, 3, self.side, self.side)

    def training_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and in the place of logits the class found for each pixel."""
        shares = self.model.shares(images.shape[-2:])
        if not self.objective.scores:
            return cross_entropy(self.run_model(images, at_image_size=False), labels, IGNORED, shares)
        self.model.set_progress(self.global_step / max(self.steps.total, 1) if self.steps else 0.0)
        predictions = self.model.head_output(images)
        with torch.no_grad():
            found = classes_of(predictions.scores, tuple(labels.shape[-2:]), shares)
        return mask_classification_loss(predictions, labels, IGNORED, shares), found

    def _evaluate(self, metrics: MetricCollection, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels, _ = images_and_labels(batch)
        labels = self.objective.read(labels, number_of(images))
        logits, shares = window_logits(self.model, images, self.window, self.stride)
        loss, found = cross_entropy(logits, labels, IGNORED, shares, scores=self.objective.scores)
        # by pixels, as IoU and accuracy are: an image of a few labelled ones, or of none, is not as good as another
        self._measure(metrics, loss, found, labels, weight=(labels != IGNORED).sum())
        return found

    def save(self, folder: Path, datamodule: pl.LightningDataModule) -> None:
        """Write the adapter with its head, as `visionpeft.load` reads it."""
        about = self.objective.describe() | {"window": self.window, "stride": self.stride}
        save(
            self.model,
            folder,
            class_names=self.class_names,
            preprocessing=datamodule.preprocessing,
            metadata={"data": datamodule.description(), "objective": about},
        )

    def describe(self) -> dict:
        """As for every task; and the head, and how it is measured."""
        return super().describe() | {
            "head": dict(self.adapter.get_submodule("head").layout),
            "measured_on": {"window": self.window, "stride": self.stride},
        }
