"""Semantic segmentation by the names of classes, with a CLIP that has seen no mask: nothing is trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from visionpeft.adapters.adapters import has_adapters
from visionpeft.adapters.attach import detach
from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.clip.learners.zero_shot import ZeroShot
from visionpeft.clip.storage import load_learner, save_learner
from visionpeft.errors import ConfigurationError, did_you_mean
from visionpeft.models.create_clip import create_clip
from visionpeft.models.open_vocabulary import Attention, OpenVocabulary
from visionpeft.models.windows import check_windows, predict_masks
from visionpeft.tasks.batches import images_and_labels, images_of, number_of
from visionpeft.tasks.optimisation import Optimisation
from visionpeft.tasks.segmentation_objective import ClassOfPixels
from visionpeft.tasks.task import ImageTask


class OpenVocabularySegmentation(ImageTask):
    """The class of every pixel by its name: an `OpenVocabulary` is tested on images with masks, and not trained.

    Texts are those of `ZeroShot`, or of a learner that was trained on whole images before (`start`). Batches are those
    of `SemanticSegmentation`. Images are seen in windows; measured are mean IoU and accuracy of pixels, and no loss.

    Args:
        class_names: one name for each class; taken from the data.
        backbone: a CLIP, `nano_clip` or `open_clip/<model>/<tag>` such as `open_clip/ViT-B-16-quickgelu/openai`.
        pretrained: load the CLIP's published weights.
        checkpoint: a local file with the CLIP's weights.
        backbone_kwargs: further arguments of `open_clip.create_model`.
        template: one template or several, with {} for the name, "a photo of a {}." when absent; not beside `start`.
        start: folder of a saved learner, such as learner/ in a run of CoOp, whose texts are taken.
        names: names by which classes are found that are not their own, such as {background: [sky, wall, grass]}.
        attention: what the attention of the last block is made of: "query" (ClearCLIP), "query_key" (SCLIP), "value"
            (MaskCLIP) or "plain" (CLIP as it is).
        residual: add the residual stream to it, as all but ClearCLIP do.
        mlp: add the MLP branch, likewise.
        threshold: pixels whose class is less probable are of the first class, the background; 0 for none.
        scale: of the cosines, on which probabilities depend; CLIP's own when absent.
        window: height and width of windows that slide over an image; those of the CLIP's own images when absent.
        stride: pixels from one window to the next; half of the window when absent.
        seed: of a CLIP without pretrained weights.

    Raises:
        ConfigurationError: names of classes that the data does not have, `template` and `start` together, windows that
            do not cover an image or are larger than those of the CLIP, or what `OpenVocabulary` refuses.
        UnsupportedError: the CLIP's image tower is not one of OpenCLIP's own ViTs.
    """

    folder = "learner"

    def __init__(
        self,
        class_names: list[str],
        backbone: str = "nano_clip",
        pretrained: bool = True,
        checkpoint: str | None = None,
        backbone_kwargs: dict | None = None,
        template: str | list[str] | None = None,
        start: str | None = None,
        names: dict[str, list[str]] | None = None,
        attention: Attention = "query",
        residual: bool = False,
        mlp: bool = False,
        threshold: float = 0.0,
        scale: float | None = None,
        window: int | None = None,
        stride: int | None = None,
        seed: int = 0,
    ):
        if template is not None and start is not None:
            raise ConfigurationError("a saved learner has texts of its own; leave out template, or start")
        super().__init__(class_names, Optimisation(), seed, ClassOfPixels(len(class_names)))
        self.classes = _names_of(class_names, names or {})
        torch.manual_seed(seed)  # a CLIP without pretrained weights is drawn
        clip, self.tokenizer = create_clip(
            backbone, pretrained=pretrained, checkpoint=checkpoint, **(backbone_kwargs or {})
        )
        self.preprocessing = preprocessing_of(clip)
        self.options = {"attention": attention, "residual": residual, "mlp": mlp}
        self.options |= {"threshold": threshold, "scale": scale}
        if start is not None:
            learner = load_learner(start, clip, self.tokenizer, self._flat_names)
        else:
            learner = ZeroShot(clip, self.tokenizer, self._flat_names, template)
        self.model = OpenVocabulary(learner, self.classes, **self.options)
        side = min(self.preprocessing.input_size)
        self.window = side if window is None else window
        self.stride = max(1, self.window // 2) if stride is None else stride
        check_windows(self.window, self.stride)
        if self.window > side:
            raise ConfigurationError(
                f"window {self.window} is larger than the images of this CLIP, {side} pixels; leave it out, or make "
                "the CLIP with force_image_size"
            )

    @property
    def _flat_names(self) -> list[str]:
        return [name for of_class in self.classes.values() for name in of_class]

    @property
    def label(self) -> str:
        """What is tested, in the name of a run directory."""
        return "OpenVocabulary"

    def describe(self) -> dict:
        """Learner and its templates, CLIP, how its last block is computed, names of the classes, windows."""
        learner = self.model.learner
        total = sum(parameter.numel() for parameter in learner.parameters())
        return {
            "learner": {"class": type(learner).__name__, "options": learner.options},
            "template": list(learner.templates) or None,
            "backbone": learner.clip.backbone_source,
            "parameters": {"trainable": 0, "total": total, "share": 0.0},
            "objective": {"labels": self.objective.labels},
            "open_vocabulary": self.options | {"classes": self.classes},
            "measured_on": {"window": self.window, "stride": self.stride},
        }

    def setup(self, stage: str) -> None:
        """As for every task; there are no epochs."""
        super().setup(stage)
        if stage == "fit":
            self.trainer.fit_loop.max_epochs = self.trainer.limit_train_batches = 0

    def configure_optimizers(self) -> None:
        """None: nothing is trained."""

    def forward(self, images: Tensor) -> Tensor:
        """Logarithms (batch, classes, height, width) of the probabilities of the classes, names of one class together.

        Raises:
            ConfigurationError: images that are larger than those of the CLIP; windows of them go to `predict_masks`.
        """
        names = self.model(images).log_softmax(1)
        owners = self.model.owners
        return torch.stack([names[:, owners == index].logsumexp(1) for index in range(len(self.classes))], dim=1)

    def training_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Refuse.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            "classes are found by their names and nothing is trained; train SemanticSegmentation, or a learner on "
            "whole images (PromptLearning) and name its folder with start"
        )

    def _evaluate(self, metrics: MetricCollection, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels, _ = images_and_labels(batch)
        labels = self.objective.read(labels, number_of(images))
        size = tuple(labels.shape[-2:])
        found = predict_masks(self.model, images, window=self.window, stride=self.stride, size=size)
        for name, metric in metrics.items():
            if name.endswith("loss"):  # there is none
                continue
            self.objective.measure(metric, found, labels)
            self.log(name, metric, on_step=False, on_epoch=True, batch_size=len(labels))
        return found

    def predict_step(self, batch, batch_idx: int) -> Tensor:
        """Class indices (batch, height, width) of the images of a batch."""
        return predict_masks(self.model, images_of(batch), window=self.window, stride=self.stride)

    def trained_parameters(self) -> list[nn.Parameter]:
        """None."""
        return []

    def trained_keys(self) -> set[str]:
        """None."""
        return set()

    def not_averaged(self) -> str:
        """Why an average over steps would not be what is tested."""
        return f"{self.label} trains nothing"

    def save(self, folder: Path, datamodule: pl.LightningDataModule) -> None:
        """Write the learner and how it is used, as `visionpeft.predict` reads it."""
        about = {"labels": self.objective.labels, "window": self.window, "stride": self.stride}
        metadata = {"data": datamodule.description(), "objective": about}
        metadata["open_vocabulary"] = self.options | {"classes": self.classes}
        save_learner(self.model.learner, folder, preprocessing=datamodule.preprocessing, metadata=metadata)

    def load(self, folder: Path) -> None:
        """Read a learner in the place of the present one, for this task's classes."""
        clip = self.model.learner.clip
        if has_adapters(clip):  # of the learner that it began with
            detach(clip)
        learner = load_learner(folder, clip, self.tokenizer, self._flat_names)
        self.model = OpenVocabulary(learner, self.classes, **self.options)


def _names_of(class_names: Sequence[str], names: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The names by which each class is found: its own, or those given.

    Raises:
        ConfigurationError: there is no such class, or no name for one.
    """
    for name, given in names.items():
        if name not in class_names:
            raise ConfigurationError(
                f"names: the data has no class {name!r}{did_you_mean(name, class_names)}; names {{}} finds each class "
                "by its own name"
            )
        if not given:
            raise ConfigurationError(f"names: class {name!r} has no name; leave it out to find it by its own")
    return {name: list(names.get(name, [name])) for name in class_names}
