"""Image classification with a frozen, adapted backbone."""

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from visionpeft.attach import attach
from visionpeft.backbones.create import create_backbone
from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.methods import Method
from visionpeft.tasks.adapted_task import AdaptedTask
from visionpeft.tasks.heads import Head, HeadInit, replace_head
from visionpeft.tasks.optimisation import Optimisation


class ImageClassification(AdaptedTask):
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
        super().__init__(method, class_names, backbone, label_smoothing, optimisation, seed)
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

    def training_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and logits; mixed images are judged by their mixed labels."""
        if self.mix is None or len(images) % 2:  # timm mixes in pairs; an odd last batch stays as it is
            return super().training_loss(images, labels)
        images, targets = self.mix(images, labels)
        logits = self(images)
        return F.cross_entropy(logits.float(), targets, label_smoothing=0.0), logits  # they are smoothed already
