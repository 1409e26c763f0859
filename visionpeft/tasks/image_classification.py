"""Image classification, or regression, with a frozen, adapted backbone."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.caching.content_cache import ContentCache, FolderCache
from visionpeft.caching.trunk import CachedTrunk
from visionpeft.data.labels import Labels
from visionpeft.errors import ConfigurationError
from visionpeft.methods import Method
from visionpeft.methods.parts.by_task import for_tasks
from visionpeft.models.create import create_backbone
from visionpeft.sites.tasks_of_rows import rows_of, tasks_of_rows
from visionpeft.tasks.adapted_task import AdaptedTask
from visionpeft.tasks.batches import images_of
from visionpeft.tasks.heads import Head, HeadInit, replace_head
from visionpeft.tasks.objective import Loss, Weights
from visionpeft.tasks.objectives import Asymmetry, build_objective
from visionpeft.tasks.optimisation import Optimisation
from visionpeft.tasks.passes import keep_all
from visionpeft.tasks.several_tasks import OneClassOfTask, check_one_task


class ImageClassification(AdaptedTask):
    """Classification by the logits of a backbone with a method attached: one class, several labels, or a number.

    The frozen modules stay in evaluation mode while training; adapter and head are in training mode. Batches are
    (images (batch, 3, height, width), labels): class indices (batch,), zeros and ones (batch, labels) of several
    labels, or numbers (batch,). A number is learnt in standard deviations from the mean of the training labels, and
    `predict_step` gives it in its own unit.

    Args:
        method: the method, or several that are stacked in order.
        class_names: one name for each class; taken from the data.
        backbone: `nano_vit`, a timm name, or `open_clip/<model>/<tag>`; see `visionpeft.create_backbone`.
        pretrained: load the backbone's published weights.
        checkpoint: a local file with the backbone's weights (.safetensors, .pth or .npz).
        backbone_kwargs: further arguments of the library's function that creates the backbone.
        head: "linear", or with a normalisation before it: "batchnorm_linear" (no scale and shift), "layernorm_linear".
        head_init: initialisation of the head: "truncated_normal", "zeros", "kaiming" or "uniform".
        train: names of further backbone parameters to train, such as "cls_token"; they travel with the adapter.
        start: folder of a saved adapter of the same method, from whose values the training starts, the head's excepted.
        drop_path: rate of the backbone's stochastic depth while training, rising linearly with depth.
        class_token_only: in the last block follow the class token alone; exact and cheaper. By default where it is all
            that is read.
        recompute: compute "mlp" (hidden activations) or "block" (all activations) again in the backward pass instead
            of keeping them; exact, for less memory.
        cache: keep what the frozen part before the first trained block gives for each image, in "memory" or in a
            folder on disk of this name, so that an epoch costs the trained blocks alone; for data without random
            augmentation, or with a number of `views`.
        cache_mib: most MiB that are kept.
        labels: what a label is, "classes", "several" of them, or a "number"; taken from the data.
        tasks: number of classes of each task where there are several, in the order of the class names; taken from the
            data (`MultiTask`). Each image is judged among the classes of its own task.
        loss: "cross_entropy" of classes; "bce" (binary cross-entropy, the default) or "asymmetric" of several labels;
            "mse" (the default) or "l1" of numbers.
        class_weights: weight of the images of each class in the training loss, in the order of the class names, or
            "balanced": n / (K n_k) for n_k of n images of class k of K.
        positive_weights: of several labels, the weight of each where it applies, or "balanced": (n - n_k) / n_k for n_k
            of n images to which label k applies.
        asymmetry: of the asymmetric loss.
        label_smoothing: probability mass spread evenly over all classes.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none; with both, one of the two is drawn for each batch.
        optimisation: optimiser, learning rates and schedule.
        seed: the randomness of an epoch (dropout, mixup) is a function of the seed and the epoch.
        compile: run the model as one graph made by `torch.compile`; the first steps take minutes, later ones less time.
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
        start: str | None = None,
        drop_path: float = 0.0,
        class_token_only: bool | None = None,
        recompute: Literal["mlp", "block"] | None = None,
        cache: str | None = None,
        cache_mib: int = 2048,
        labels: Labels = "classes",
        tasks: dict[str, int] | None = None,
        loss: Loss | None = None,
        class_weights: Weights = None,
        positive_weights: Weights = None,
        asymmetry: Asymmetry | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        optimisation: Optimisation = Optimisation(),  # noqa: B008  (frozen)
        seed: int = 0,
        compile: bool = False,
    ):
        if compile and cache:
            raise ConfigurationError(
                "compile makes one graph of the whole model, of which cache runs only what follows the frozen part; "
                "leave one of the two out"
            )
        objective = build_objective(
            labels,
            len(class_names),
            loss=loss,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            positive_weights=positive_weights,
            asymmetry=asymmetry,
        )
        if tasks is not None:
            options = {"class_weights": class_weights, "mixup": mixup, "cutmix": cutmix}
            check_one_task(options, method if isinstance(method, list | tuple) else [method], recompute, compile)
            objective = OneClassOfTask(tasks, label_smoothing)
            method = for_tasks(method, list(tasks))
        super().__init__(method, class_names, backbone, label_smoothing, optimisation, seed, objective)
        self.tasks = tasks
        if (mixup or cutmix) and labels != "classes":
            raise ConfigurationError(f"mixup and cutmix mix classes; with labels {labels!r}, set both to 0")
        outputs = objective.outputs
        random = {"drop_path": drop_path, "mixup": mixup, "cutmix": cutmix}
        for name, value in random.items():
            if cache and value:
                raise ConfigurationError(
                    f"cache keeps what the frozen part gives for an image, which {name} {value} changes each time; set "
                    f"{name} to 0, or leave cache out"
                )

        kwargs = self.backbone_arguments(backbone_kwargs, drop_path)
        torch.manual_seed(seed)
        self.model = create_backbone(
            backbone, pretrained=pretrained, checkpoint=checkpoint, num_classes=outputs, **kwargs
        )
        replace_head(self.model, head, outputs, head_init)
        self.preprocessing = preprocessing_of(self.model)
        self.adapt(train, start, class_token_only=class_token_only, recompute=recompute)
        self.trunk = self._cached_trunk(cache, cache_mib) if cache else None
        if compile:
            self.compile_model()
        mixes = bool(mixup or cutmix)
        self.mix = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=outputs) if mixes else None

    def _cached_trunk(self, cache: str, mib: int) -> CachedTrunk:
        """The model, of which what the frozen part gives is kept in "memory" or in a folder."""
        if self.adapter.pending:
            raise ConfigurationError(f"{self.label} chooses what it trains by the data; leave cache out")
        kept = ContentCache(mib * 2**20) if cache == "memory" else FolderCache(cache, mib * 2**20)
        return CachedTrunk(self.model, kept)

    def of_tasks(self, labels: Tensor | None) -> AbstractContextManager:
        """Within the context methods know the task of each image by its label, (batch,)."""
        if self.tasks is None:
            return nullcontext()
        rows = torch.tensor(0) if labels is None else self.objective.tasks_of(labels)
        return tasks_of_rows(tuple(self.tasks), rows)

    def predict_step(self, batch, batch_idx: int) -> Tensor:
        """As for every task; of several tasks within `visionpeft.of_tasks`, 0 for classes of other tasks.

        Raises:
            ConfigurationError: there are several tasks, and that of the images is not known.
        """
        if self.tasks is None:
            return super().predict_step(batch, batch_idx)
        images = images_of(batch)
        rows = rows_of(tuple(self.tasks), images, type(self).__name__)
        return self.objective.answers(self.objective.among_own(self(images).float(), rows))

    def connect(self, datamodule: pl.LightningDataModule) -> None:
        """Tell the data how this backbone wants its images.

        Raises:
            ConfigurationError: the data has videos, or shows images in ever new ways, so that nothing can be kept.
        """
        super().connect(datamodule)
        if self.trunk is not None and getattr(datamodule, "streams", False):
            raise ConfigurationError(
                "cache looks images up again by what was kept of them, and a stream is only read in order; leave cache "
                "out, or use a data set that is fetched as a whole (--data.source hfds/...)"
            )
        if self.trunk is not None and getattr(datamodule, "deterministic_views", None) is None:
            raise ConfigurationError(
                "cache keeps what the frozen part gives for an image, but the data augments images anew in each epoch; "
                "set augmentation to none or views to a number (--data.views 4), or leave cache out"
            )

    def setup(self, stage: str) -> None:
        """Connect task and data; before training, run the frozen part on all training images if it is kept."""
        super().setup(stage)
        if self.trunk is None:
            return
        self.trunk.hash_again()
        if stage == "fit" and self.trainer.datamodule is not None:
            views = min(self.trainer.datamodule.deterministic_views, self.num_epochs)
            keep_all(self, views, self.trunk.output, self.trunk.cache)
            self.train()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, outputs)."""
        return super().forward(images) if self.trunk is None else self.trunk(images)

    def load(self, folder: Path) -> None:
        """Read an adapter in the place of the attached one."""
        super().load(folder)
        if self.trunk is not None:
            self.trunk = CachedTrunk(self.model, self.trunk.cache)

    def loss_weight(self, labels: Tensor) -> Tensor | None:
        """By what the objective divides; of mixed images, and of those that stay as they are, it is their number."""
        return super().loss_weight(labels) if self.mix is None else None

    def training_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and logits; mixed images are judged by their mixed labels."""
        if self.mix is not None and labels.is_floating_point():
            raise ConfigurationError(
                "labels are probabilities, as those of images that are mixed already; set mixup and cutmix to 0"
            )
        odd = len(images) % 2  # timm mixes in pairs; an odd last batch stays as it is
        if self.mix is None or (odd and super().loss_weight(labels) is None):
            return super().training_loss(images, labels)
        if odd:  # with class weights, divided as mixed images are
            targets = mixup_target(labels, self.mix.num_classes, smoothing=self.mix.label_smoothing)
        else:
            images, targets = self.mix(images, labels)
        logits = self.noted_pass(images)
        return self.objective.mixed_loss(logits.float(), targets), logits
