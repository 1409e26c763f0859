"""Detection and instance segmentation with a frozen, adapted backbone and a head on its map."""

from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.data import ImageDataModule
from visionpeft.errors import ConfigurationError, DataError
from visionpeft.heads import FCOS, DetectionHead, MaskRCNN
from visionpeft.methods import Method
from visionpeft.models.create import create_dense_backbone
from visionpeft.models.object_detector import ObjectDetector
from visionpeft.tasks.adapted_task import AdaptedTask
from visionpeft.tasks.average_precision import AveragePrecision, evaluation
from visionpeft.tasks.batches import images_and_labels, images_of
from visionpeft.tasks.detection_objective import ObjectsOfImage
from visionpeft.tasks.fixed_sizes import check_measured_sizes
from visionpeft.tasks.optimisation import Optimisation

LEARNT = ("boxes", "labels", "masks")
MEASURED = ("size", "truth")  # what measuring needs besides


class ObjectDetection(AdaptedTask):
    """The losses of the head of an `ObjectDetector` with a method attached.

    The frozen modules stay in evaluation mode while training; adapter and head are in training mode. Batches are images
    (batch, 3, height, width) and a list of what is to be found in each, as `ObjectDataset` gives them. Measured are the
    loss, in which Faster and Mask R-CNN draw regions at random, and average precision over a whole split.

    Args:
        method: the method, or several that are stacked in order.
        class_names: one name for each class of objects; taken from the data.
        backbone: `nano_vit`, a timm name, or `open_clip/<model>/<tag>`; see `visionpeft.create_backbone`.
        pretrained: load the backbone's published weights.
        checkpoint: a local file with the backbone's weights (.safetensors, .pth or .npz).
        backbone_kwargs: further arguments of the library's function that creates the backbone; that it takes images of
            any size, `dynamic_img_size`, is among them where timm's model knows it.
        masks: find the mask of each object as well, from data that has masks.
        head: what finds objects in the map of the backbone; by default `FCOS()`, or `MaskRCNN()` with masks.
        train: names of further backbone parameters to train, such as "backbone.cls_token"; they travel with it.
        start: folder of a saved adapter of the same method, from whose values training starts, the head's excepted.
        drop_path: rate of the backbone's stochastic depth while training, rising linearly with depth.
        recompute: compute "mlp" (hidden activations) or "block" (all activations) again in the backward pass instead
            of keeping them; exact, for less memory.
        optimisation: optimiser, learning rates and schedule.
        seed: the randomness of an epoch is a function of the seed and the epoch.

    Raises:
        ConfigurationError: masks and a head without them, or the other way round; or faster-coco-eval is missing.
    """

    def __init__(
        self,
        method: Method | list[Method],
        class_names: list[str],
        backbone: str = "nano_vit",
        pretrained: bool = True,
        checkpoint: str | None = None,
        backbone_kwargs: dict | None = None,
        masks: bool = False,
        head: DetectionHead | None = None,
        train: list[str] | None = None,
        start: str | None = None,
        drop_path: float = 0.0,
        recompute: Literal["mlp", "block"] | None = None,
        optimisation: Optimisation = Optimisation(),  # noqa: B008  (frozen)
        seed: int = 0,
    ):
        head = head or (MaskRCNN() if masks else FCOS())
        if masks != head.masks:
            has = "finds masks" if head.masks else "finds no masks"
            raise ConfigurationError(
                f"the head {type(head).__name__} {has}, but masks is {str(masks).lower()}; with masks use MaskRCNN "
                "(--model.masks true --model.head MaskRCNN), without FCOS or FasterRCNN"
            )
        evaluation()
        objective = ObjectsOfImage(len(class_names), masks)
        super().__init__(method, class_names, backbone, 0.0, optimisation, seed, objective)
        kwargs = self.backbone_arguments(backbone_kwargs, drop_path)
        torch.manual_seed(seed)
        images = create_dense_backbone(backbone, pretrained=pretrained, checkpoint=checkpoint, **kwargs)
        self.preprocessing = preprocessing_of(images)
        self.head = head
        self.model = ObjectDetector(images, head, class_names)
        self.adapt(train, start, recompute=recompute)
        self.side = min(self.preprocessing.input_size)
        self.masks = masks
        self.precision: dict[str, AveragePrecision] = {}  # of the split that is being measured, by its name
        self.measured: dict[str, dict] = {}  # what the last measurement of each split has found

    def connect(self, datamodule: pl.LightningDataModule) -> None:
        """Tell the data how this backbone wants its images.

        Raises:
            ConfigurationError: the data has no objects, or no masks where they are to be learnt.
        """
        super().connect(datamodule)
        if isinstance(datamodule, ImageDataModule):
            if self.masks and not datamodule.with_masks:
                raise ConfigurationError(
                    f"{type(datamodule).__name__} has boxes and no masks here; leave --model.masks false, or give data "
                    "with masks (--data.masks true)"
                )
            self.side = datamodule.side

    def compile_model(self) -> None:
        """Refuse: how many objects are found decides what is computed.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError("detection is not compiled, as it is no one graph")

    def on_fit_start(self) -> None:
        """As for every task; and see that what will be measured is of a size that the backbone takes."""
        super().on_fit_start()
        check_measured_sizes(self.model, self.trainer)

    def example(self) -> Tensor:
        """A batch of one training image, of zeros."""
        return torch.zeros(1, 3, self.side, self.side)

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        """What is found in each image, in its pixels."""
        return self.model(images)

    def training_loss(self, images: Tensor, labels: list[dict]) -> tuple[Tensor, Tensor]:
        """The sum of the losses, also in the place of logits, of which there are none to measure."""
        loss = self.objective.loss(self.model.losses(images, self._to_learn(labels)), labels)
        return loss, loss

    def loss_of_shown(self, model: nn.Module, batch: tuple[Tensor, list[dict]]) -> Tensor:
        """Loss of a batch, as methods see it that choose by the data."""
        images, labels, _ = images_and_labels(batch)
        return self.objective.loss(self.model.losses(images, self._to_learn(labels)), labels)

    def _to_learn(self, targets: list[dict]) -> list[dict[str, Tensor]]:
        names = LEARNT if self.masks else LEARNT[:2]
        _check_targets(targets, names)
        return [{name: target[name] for name in names} for target in targets]

    def _evaluate(self, metrics: MetricCollection, batch: tuple[Tensor, list[dict]]) -> list[dict[str, Tensor]]:
        images, targets, _ = images_and_labels(batch)
        _check_targets(targets, MEASURED)
        losses, found = self.model.measure(
            images, self._to_learn(targets), [tuple(target["size"]) for target in targets]
        )
        self._measure(metrics, self.objective.loss(losses, targets), found, targets)
        split = metrics.prefix.rstrip("/")
        for target, image in zip(targets, found, strict=True):
            self.precision[split].add(target["truth"], target["size"], image)
        return found

    def predict_step(self, batch, batch_idx: int) -> list[dict[str, Tensor]]:
        """What is found in each image of a batch, in its pixels."""
        return self(images_of(batch))

    def on_validation_epoch_start(self) -> None:
        """Begin to measure."""
        self.precision["val"] = AveragePrecision(self.class_names, self.masks)

    def on_validation_epoch_end(self) -> None:
        """Average precision of the validation split."""
        self._log_precision("val")

    def on_test_epoch_start(self) -> None:
        """Seed the test, for what is random in it, and begin to measure."""
        super().on_test_epoch_start()
        self.precision["test"] = AveragePrecision(self.class_names, self.masks)

    def on_test_epoch_end(self) -> None:
        """Average precision of the test split."""
        self._log_precision("test")

    def _log_precision(self, split: str) -> None:
        whole = self.precision.pop(split)
        if self.trainer.world_size > 1:
            shares = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(shares, whole.images)
            whole.images = [image for share in shares for image in share]
        self.measured[split] = whole.detail()
        if self.measured[split]["ap"] is None:
            raise DataError(
                f"none of the {len(whole.images)} images measured of the {split} split has an object, so that nothing "
                "can be measured; take other images"
            )
        for name, value in self.measured[split].items():
            if isinstance(value, float):
                value = torch.tensor(value, device=self.device)  # the same in every process
                self.log(f"{split}/{name}", value, on_step=False, on_epoch=True, sync_dist=True)

    def describe(self) -> dict:
        """As for every task; and the head."""
        return super().describe() | {"head": dict(self.adapter.get_submodule("head").layout)}


def _check_targets(targets: object, names: tuple[str, ...]) -> None:
    """See to it that each image's targets have what is used.

    Raises:
        DataError: they have not, as those of another package's loader.
    """
    if not isinstance(targets, list | tuple) or not all(isinstance(target, dict) for target in targets):
        raise DataError(
            f"targets of a batch must be a list with a dict of {', '.join(names)} for each image, and this one is a "
            f"{type(targets).__name__}; take a data module of visionpeft.data, or let the loader's collate_fn make them"
        )
    for target in targets:
        if missing := [name for name in names if name not in target]:
            raise DataError(
                f"the targets of an image lack {', '.join(missing)}, and have {', '.join(target) or 'nothing'}; take a "
                "data module of visionpeft.data, or let the loader give them as those do"
            )
