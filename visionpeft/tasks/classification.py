"""Image classification with a frozen, adapted backbone."""

import random

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.layers import DropPath
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from visionpeft.adapters import AttachedAdapter
from visionpeft.attach import attach, trainable_parameters
from visionpeft.backbones.create import create_backbone
from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.errors import ConfigurationError
from visionpeft.methods import Method
from visionpeft.tasks.checkpointing import DivergedError, check_trained, keep_trained
from visionpeft.tasks.heads import Head, HeadInit, replace_head
from visionpeft.tasks.optimisation import Optimisation, build_optimizer, build_schedule, parameter_groups


class ImageClassification(pl.LightningModule):
    """Cross-entropy on the logits of a backbone with a method attached.

    The frozen modules stay in evaluation mode while training; adapter and head are in training mode. Batches are
    (images (batch, 3, height, width), labels (batch,)).

    Args:
        method: the method, or several that are stacked in order.
        class_names: one name for each class; taken from the data.
        backbone: `nano_vit`, a timm name, or `open_clip/<model>/<tag>`; see `visionpeft.create_backbone`.
        pretrained: load the backbone's published weights.
        checkpoint: a local file with the backbone's weights (.safetensors, .pth or .npz).
        backbone_kwargs: further arguments of the library's function that creates the backbone.
        head: "linear", or with a normalisation in front: "batchnorm_linear" (no scale and shift), "layernorm_linear".
        head_init: initialisation of the head: "truncated_normal", "zeros", "kaiming" or "uniform".
        train: names of further backbone parameters to train, such as "cls_token"; they travel with the adapter.
        drop_path: rate of the backbone's stochastic depth while training, rising linearly with depth.
        label_smoothing: probability mass spread evenly over all classes.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none; with both, one of the two is drawn for each batch.
        optimisation: optimiser, learning rates and schedule.
        seed: the randomness of an epoch (dropout, mixup) is a function of the seed and the epoch.
    """

    def __init__(
        self,
        method: Method | list[Method],
        class_names: list[str],
        backbone: str = "nano_vit",
        pretrained: bool = True,
        checkpoint: str | None = None,
        backbone_kwargs: dict | None = None,
        head: Head = "linear",
        head_init: HeadInit = "truncated_normal",
        train: list[str] | None = None,
        drop_path: float = 0.0,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        optimisation: Optimisation = Optimisation(),  # noqa: B008  (frozen)
        seed: int = 0,
    ):
        super().__init__()
        if len(class_names) < 2:
            raise ConfigurationError(f"classification needs at least two classes, the data has {len(class_names)}")
        self.strict_loading = False  # checkpoints hold no backbone; `on_load_checkpoint` checks what they hold
        self.class_names = list(class_names)
        self.backbone_name = backbone
        self.methods = list(method) if isinstance(method, list | tuple) else [method]
        self.optimisation = optimisation
        self.label_smoothing = label_smoothing
        self.seed = seed
        self.adapter_name = "default"
        num_classes = len(class_names)

        kwargs = dict(backbone_kwargs or {}) | ({"drop_path_rate": drop_path} if drop_path else {})
        torch.manual_seed(seed)
        self.model = create_backbone(
            backbone, pretrained=pretrained, checkpoint=checkpoint, num_classes=num_classes, **kwargs
        )
        replace_head(self.model, head, num_classes, head_init)
        self.preprocessing = preprocessing_of(self.model)
        attach(self.model, self.methods, name=self.adapter_name, train=tuple(train or ()))

        self.mix = None
        if mixup or cutmix:
            self.mix = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)
        metrics = {"loss": MeanMetric(), "top1": MulticlassAccuracy(num_classes, average="micro")}
        if num_classes > 5:
            metrics["top5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
        metrics = MetricCollection(metrics, compute_groups=False)
        self.train_metrics, self.val_metrics, self.test_metrics = (
            metrics.clone(prefix=f"{split}/") for split in ("train", "val", "test")
        )

    @property
    def adapter(self) -> AttachedAdapter:
        """The attached adapter with its head."""
        return self.model.peft[self.adapter_name]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, number of classes)."""
        return self.model(images)

    def train(self, mode: bool = True):
        """Training mode for adapter, head and active stochastic depth; the frozen rest stays in evaluation mode."""
        super().train(mode)
        if mode:
            self.model.eval()
            self.model.peft.train()
            for module in self.model.modules():
                if isinstance(module, DropPath):
                    module.train()
        return self

    def setup(self, stage: str) -> None:
        """Tell the data how this backbone wants its images."""
        if self.trainer.datamodule is not None:
            self.trainer.datamodule.preprocessing = self.preprocessing

    def on_train_epoch_start(self) -> None:
        """Seed the epoch, so that a resumed run draws what the uninterrupted one would have drawn."""
        seed = _epoch_seed(self.seed, self.current_epoch)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  (timm's mixup draws from NumPy's global generator)
        torch.manual_seed(seed)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of a batch.

        Raises:
            DivergedError: the loss is not finite.
        """
        images, labels = batch
        if self.mix is not None and len(images) % 2 == 0:  # timm mixes in pairs; an odd last batch stays as it is
            images, targets = self.mix(images, labels)
        else:
            targets = labels
        logits = self(images)
        smoothing = 0.0 if targets.is_floating_point() else self.label_smoothing  # mixed targets are smoothed already
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        if not torch.isfinite(loss):
            raise DivergedError(
                f"the training loss became {loss.item()} in epoch {self.current_epoch}, step {self.global_step}; the "
                "last good checkpoint is kept. Lower the learning rate (--model.optimisation.lr)"
            )
        self._measure(self.train_metrics, loss.detach(), logits.detach(), labels)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure a batch of the validation split."""
        self._evaluate(self.val_metrics, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Measure a batch of the test split and return its logits."""
        return self._evaluate(self.test_metrics, batch)

    def predict_step(self, batch, batch_idx: int) -> Tensor:
        """Class probabilities (batch, number of classes)."""
        images = batch[0] if isinstance(batch, list | tuple) else batch
        return self(images).float().softmax(dim=-1)

    def _evaluate(self, metrics: MetricCollection, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        logits = self(images).float()
        self._measure(metrics, F.cross_entropy(logits, labels), logits, labels)
        return logits

    def _measure(self, metrics: MetricCollection, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        for name, metric in metrics.items():
            if name.endswith("loss"):
                metric.update(loss, weight=len(labels))
            else:
                metric.update(logits, labels)
            self.log(name, metric, on_step=False, on_epoch=True, batch_size=len(labels))

    def configure_optimizers(self) -> dict:
        """AdamW or SGD over adapter and head, with a schedule that advances every step."""
        trainer = self.trainer
        if trainer.estimated_stepping_batches == float("inf"):
            raise ConfigurationError("the learning rate follows a cosine to its end: set trainer.max_epochs")
        total_steps = int(trainer.estimated_stepping_batches)
        batch_size = getattr(trainer.datamodule, "batch_size", 1) * trainer.accumulate_grad_batches * trainer.world_size
        trainable = trainable_parameters(self.model)
        groups = parameter_groups(trainable, self.adapter.head_parameters(), self.optimisation, batch_size)
        optimizer = build_optimizer(groups, self.optimisation)
        schedule = build_schedule(optimizer, self.optimisation, total_steps, total_steps / max(1, trainer.max_epochs))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Keep only what is trained."""
        keep_trained(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Check that every trained tensor is there."""
        check_trained(checkpoint, self)


def _epoch_seed(seed: int, epoch: int) -> int:
    """A 32-bit seed for an epoch."""
    return int(torch.randint(2**32 - 1, (), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)))
