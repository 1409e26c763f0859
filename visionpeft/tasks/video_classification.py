"""Video classification with a frozen, adapted backbone of images."""

import lightning.pytorch as pl
import torch
from torch import Tensor

from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.data import ImageDataModule
from visionpeft.errors import ConfigurationError
from visionpeft.methods import Method
from visionpeft.models.create import create_backbone
from visionpeft.models.video_classifier import VideoClassifier
from visionpeft.models.video_views import over_views
from visionpeft.tasks.adapted_task import AdaptedTask
from visionpeft.tasks.optimisation import Optimisation


class VideoClassification(AdaptedTask):
    """Cross-entropy on the logits of a `VideoClassifier` with a method attached.

    The frozen modules stay in evaluation mode while training; adapter and head are in training mode. Batches are
    (clips (batch, 3, frames, height, width), labels (batch,)); for the test the videos may come in several views,
    (batch, views, 3, frames, height, width), whose class probabilities are averaged.

    Args:
        method: the method, or several that are stacked in order. `STAdapter` and `AIM` act across frames, every other
            method in each frame by itself.
        class_names: one name for each class; taken from the data.
        backbone: `nano_vit`, a timm name, or `open_clip/<model>/<tag>`; see `visionpeft.create_backbone`.
        pretrained: load the backbone's published weights.
        checkpoint: a local file with the backbone's weights (.safetensors, .pth or .npz).
        backbone_kwargs: further arguments of the library's function that creates the backbone.
        num_frames: frames of a clip; as many as the data gives.
        interpolate: let `AIM` take clips of another number of frames than its own, by interpolating its embedding of
            time.
        dropout: dropout before the head; ST-Adapter and AIM have 0.5.
        train: names of further backbone parameters to train, such as "backbone.cls_token"; they travel with the
            adapter.
        drop_path: rate of the backbone's stochastic depth while training, rising linearly with depth.
        label_smoothing: probability mass spread evenly over all classes.
        optimisation: optimiser, learning rates and schedule.
        seed: the randomness of an epoch (dropout) is a function of the seed and the epoch.
        head_std: standard deviation of the head's first weights; ST-Adapter has 0.02, AIM 0.01.
        compile: run the model as one graph made by `torch.compile`; the first steps take minutes, later ones less time.
    """

    kind = "videos"

    def __init__(
        self,
        method: Method | list[Method],
        class_names: list[str],
        backbone: str = "nano_vit",
        pretrained: bool = True,
        checkpoint: str | None = None,
        backbone_kwargs: dict | None = None,
        num_frames: int = 8,
        interpolate: bool = False,
        dropout: float = 0.5,
        train: list[str] | None = None,
        drop_path: float = 0.0,
        label_smoothing: float = 0.0,
        optimisation: Optimisation = Optimisation(),  # noqa: B008  (frozen)
        seed: int = 0,
        head_std: float = 0.02,
        compile: bool = False,
    ):
        super().__init__(method, class_names, backbone, label_smoothing, optimisation, seed)
        kwargs = self.backbone_arguments(backbone_kwargs, drop_path)
        torch.manual_seed(seed)
        images = create_backbone(backbone, pretrained=pretrained, checkpoint=checkpoint, **kwargs)
        self.preprocessing = preprocessing_of(images)
        self.model = VideoClassifier(
            images, num_frames=num_frames, num_classes=len(class_names), dropout=dropout, head_std=head_std
        )
        self.model.set_num_frames(num_frames, interpolate)
        self.adapt(train, class_token_only=None)
        if compile:
            self.compile_model()

    def connect(self, datamodule: pl.LightningDataModule) -> None:
        """Tell the data how this backbone wants its frames.

        Raises:
            ConfigurationError: the data has images, or clips of another number of frames.
        """
        super().connect(datamodule)
        given = datamodule.sampling.num_frames if isinstance(datamodule, ImageDataModule) else self.model.num_frames
        if given != self.model.num_frames:
            raise ConfigurationError(
                f"the data gives clips of {given} frames (--data.sampling.num_frames), but the model takes "
                f"{self.model.num_frames} (--model.num_frames); give both the same number"
            )

    def example(self) -> Tensor:
        """A batch of one clip, of zeros."""
        return torch.zeros(1, 3, self.model.num_frames, *self.preprocessing.input_size)

    def forward(self, clips: Tensor) -> Tensor:
        """Logits (batch, classes) of clips; of several views of each video, the log of the mean probabilities."""
        return over_views(self.run_model, clips) if clips.ndim == 6 else self.run_model(clips)
