"""An image backbone as a classifier of clips: every frame is an image, and what is averaged are their features."""

from collections.abc import Sequence

import torch
from torch import nn

from visionpeft.adapters.attach import attach
from visionpeft.backbones.dispatch import describe_model
from visionpeft.backbones.frames import Frames
from visionpeft.backbones.layers_only import describe_part
from visionpeft.backbones.tower import Backbone
from visionpeft.backbones.whole_model import describe
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.methods.parts.base import Method
from visionpeft.methods.parts.field_types import as_python
from visionpeft.models.image_classifier import ImageClassifier, has_trunk, is_native, output_width


class VideoClassifier(nn.Module):
    """head(mean over frames of backbone(frame)), with linear(dropout(x)) as the head.

    Every method of images acts in each frame by itself, and `LinearProbe` is the probe on averaged frames. `STAdapter`
    and `AIM` act across the frames of a clip, too. `attach`, `save`, `load` and everything else take this model, not
    the backbone in it. The features of a frame are what the classifier of a timm model or of an `ImageClassifier`
    reads, or the output of an OpenCLIP image tower. They are averaged after the final norm, as by AIM's authors;
    `STAdapter` averages before it, as its authors do. The head is N(0, head_std^2) with a bias of zero.

    Shapes: clips (batch, channels, frames, height, width) -> logits (batch, num_classes), or features
    (batch, num_features) if num_classes is 0.

    Args:
        backbone: a timm model, an `ImageClassifier`, or the image tower of an OpenCLIP model. It stays as it is; a
            classifier of its own is not used.
        method: a method or several, attached as the adapter "default"; None to attach later.
        num_frames: frames of the clips.
        num_classes: outputs of the head; 0 for none.
        dropout: dropout before the head; ST-Adapter and AIM have 0.5.
        head_std: standard deviation of the head's first weights; ST-Adapter has 0.02, AIM 0.01.

    Raises:
        UnsupportedError: if the backbone is no supported model of images, or the method does not fit it.
        ConfigurationError: if a number makes no sense.
    """

    def __init__(
        self,
        backbone: nn.Module,
        method: Method | Sequence[Method] | None = None,
        *,
        num_frames: int = 8,
        num_classes: int = 0,
        dropout: float = 0.5,
        head_std: float = 0.02,
    ):
        super().__init__()
        num_frames, num_classes = _checked_number(num_frames), as_python(num_classes)
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ConfigurationError(f"num_classes must be a number of classes, or 0 for none, not {num_classes!r}")
        if not 0 <= dropout < 1:
            raise ConfigurationError(f"dropout must be in [0, 1), not {dropout}")
        if head_std < 0:
            raise ConfigurationError(f"head_std must not be negative, but is {head_std}")
        self.num_features = _num_features(backbone)
        describe(backbone)
        self.backbone = backbone
        self.frames = Frames(num_frames)
        self.head = _head(self.num_features, num_classes, dropout, head_std, next(backbone.parameters()))
        if hasattr(backbone, "backbone_source"):
            self.backbone_source = backbone.backbone_source
        self.train(backbone.training)
        if method is not None:
            attach(self, method)

    @property
    def num_frames(self) -> int:
        """Frames of the clips."""
        return self.frames.number

    def set_num_frames(self, num_frames: int, interpolate: bool = False) -> None:
        """Take clips of another number of frames.

        It is a setting of the model, not of a call: change it before a forward, not between it and its backward.

        Args:
            num_frames: frames of the clips from now on.
            interpolate: interpolate what was trained for another number, which `AIM` refuses otherwise.
        """
        self.frames.number, self.frames.interpolate = _checked_number(num_frames), interpolate

    def frame_features(self, clips: torch.Tensor) -> torch.Tensor:
        """Features (batch, frames, num_features) of each frame of clips (batch, channels, frames, height, width).

        Raises:
            ConfigurationError: if these are no such clips, or clips of another number of frames.
        """
        if clips.ndim != 5:
            raise ConfigurationError(
                "a VideoClassifier takes clips (batch, channels, frames, height, width), not a tensor of shape "
                f"{tuple(clips.shape)}; a single image is a clip of one frame after set_num_frames(1)"
            )
        if clips.shape[2] != self.num_frames:
            raise ConfigurationError(
                f"the clips have {clips.shape[2]} frames, but this model takes {self.num_frames}; call "
                f"set_num_frames({clips.shape[2]}) first"
            )
        return self.frames.split(_features(self.backbone, clips.transpose(1, 2).flatten(0, 1)))

    def forward_features(self, clips: torch.Tensor) -> torch.Tensor:
        """Mean over the frames of their features (batch, num_features)."""
        return self.frame_features(clips).mean(dim=1)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Logits (batch, num_classes)."""
        return self.head(self.forward_features(clips))

    def get_classifier(self) -> nn.Module:
        """The head, under the name timm uses."""
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of blocks in the backward pass."""
        inside = self.backbone.visual if isinstance(self.backbone, ImageClassifier) else self.backbone
        inside.set_grad_checkpointing(enable)


@describe_model.register
def _(model: VideoClassifier) -> Backbone:
    inside = describe_part(model.backbone)
    tower = inside.towers["visual"]
    tower.path = f"backbone.{tower.path}".rstrip(".")
    tower.frames = model.frames
    heads = () if isinstance(model.head, nn.Identity) else ("head",)
    unused = tuple(f"backbone.{path}" for path in inside.heads)
    return Backbone(inside.library, inside.name, model, {"visual": tower}, heads, unused_heads=unused)


def _features(backbone: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the classifier of a model of images reads (batch, num_features)."""
    if isinstance(backbone, ImageClassifier):
        return backbone.forward_features(images)
    if hasattr(backbone, "forward_head"):
        return backbone.forward_head(backbone.forward_features(images), pre_logits=True)
    features = backbone(images)
    return features[0] if isinstance(features, tuple) else features  # CoCa's tower returns its tokens, too


def _num_features(backbone: nn.Module) -> int:
    if isinstance(backbone, ImageClassifier):
        return backbone.num_features
    if hasattr(backbone, "forward_head"):
        return getattr(backbone, "head_hidden_size", backbone.num_features)
    if is_native(backbone) or has_trunk(backbone):
        return output_width(backbone)
    advice = "; give its image tower, .visual" if hasattr(backbone, "visual") else ""
    raise UnsupportedError(
        f"a VideoClassifier takes a timm model, an ImageClassifier or an OpenCLIP image tower, not a "
        f"{type(backbone).__name__}{advice}"
    )


def _head(num_features: int, num_classes: int, dropout: float, std: float, like: torch.Tensor) -> nn.Module:
    if not num_classes:
        return nn.Identity()
    linear = nn.Linear(num_features, num_classes, device=like.device, dtype=like.dtype)
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.Dropout(dropout), linear)


def _checked_number(num_frames: int) -> int:
    number = as_python(num_frames)
    if not isinstance(number, int) or number < 1:
        raise ConfigurationError(f"num_frames must be a positive integer, not {num_frames!r}")
    return number
