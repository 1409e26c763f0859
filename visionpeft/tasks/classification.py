"""Image classification with a frozen, adapted backbone."""

from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.layers import DropPath
from torch import Tensor, nn

from visionpeft.adapters import AttachedAdapter
from visionpeft.attach import attach, detach, trainable_parameters
from visionpeft.backbones.create import create_backbone
from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.methods import Method
from visionpeft.methods.base import describe_method
from visionpeft.storage import load, save
from visionpeft.tasks.heads import Head, HeadInit, replace_head
from visionpeft.tasks.image_task import ImageTask
from visionpeft.tasks.optimisation import Optimisation


class ImageClassification(ImageTask):
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

    folder = "adapter"

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
        super().__init__(class_names, optimisation, seed)
        self.backbone_name = backbone
        self.methods = list(method) if isinstance(method, list | tuple) else [method]
        self.label_smoothing = label_smoothing
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

    @property
    def adapter(self) -> AttachedAdapter:
        """The attached adapter with its head."""
        return self.model.peft[self.adapter_name]

    @property
    def label(self) -> str:
        """Names of the methods."""
        return "+".join(type(method).__name__ for method in self.methods)

    def describe(self) -> dict:
        """Methods, backbone and parameter counts."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        trainable = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        return {
            "method": [describe_method(method) for method in self.methods],
            "backbone": self.model.backbone_source,
            "parameters": {
                "trainable": trainable,
                "adapter": self.adapter.num_parameters(),
                "total": total,
                "share": trainable / total,
            },
        }

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes)."""
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

    def training_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and logits; mixed images are judged by their mixed labels."""
        if self.mix is not None and len(images) % 2 == 0:  # timm mixes in pairs; an odd last batch stays as it is
            images, targets = self.mix(images, labels)
        else:
            targets = labels
        logits = self(images)
        smoothing = 0.0 if targets.is_floating_point() else self.label_smoothing  # mixed targets are smoothed already
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing), logits

    def trained_parameters(self) -> list[nn.Parameter]:
        """Adapter and head."""
        return trainable_parameters(self.model)

    def head_parameters(self) -> list[nn.Parameter]:
        """The head."""
        return self.adapter.head_parameters()

    def trained_keys(self) -> set[str]:
        """Everything of the adapters."""
        return {key for key in self.state_dict() if key.startswith("model.peft.")}

    def save(self, folder: Path, datamodule: pl.LightningDataModule) -> None:
        """Write the adapter, as `visionpeft.load` reads it."""
        save(
            self.model,
            folder,
            class_names=self.class_names,
            preprocessing=datamodule.preprocessing,
            metadata={"data": datamodule.description()},
        )

    def load(self, folder: Path) -> None:
        """Read an adapter in the place of the attached one."""
        detach(self.model)
        self.adapter_name = load(self.model, folder)
