"""The image tower of an OpenCLIP model followed by a classification head."""

import sys

from torch import Tensor, nn

from visionpeft.backbones.dispatch import describe_model
from visionpeft.backbones.layers_only import describe_part
from visionpeft.backbones.tower import Backbone
from visionpeft.errors import UnsupportedError


class ImageClassifier(nn.Module):
    """`head(visual(images))`.

    Args:
        visual: image tower of an OpenCLIP model, returning features (batch, num_features).
        num_classes: width of the linear head; 0 returns the features.
        projected: keep the tower's projection into the space shared with text. By default the projection is removed
            and the features are the pooled, normalised tokens, as classifiers on CLIP towers use them.

    Shapes: images (batch, 3, height, width) -> logits (batch, num_classes) or features (batch, num_features).
    """

    def __init__(self, visual: nn.Module, num_classes: int = 0, projected: bool = False):
        super().__init__()
        self.visual = visual
        if not projected:
            _remove_projection(visual)
        self.num_features = output_width(visual)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, images: Tensor) -> Tensor:
        """Pooled features (batch, num_features)."""
        return self.visual(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, num_classes)."""
        return self.head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """The head, under the name timm uses."""
        return self.head


@describe_model.register
def _(model: ImageClassifier) -> Backbone:
    visual = describe_part(model.visual)
    tower = visual.towers["visual"]
    tower.path = f"visual.{tower.path}".rstrip(".")
    heads = () if isinstance(model.head, nn.Identity) else ("head",)
    return Backbone("open_clip", visual.name, model, {"visual": tower}, heads)


def is_native(tower: nn.Module) -> bool:
    """Whether this is an image tower of OpenCLIP's own blocks; of a library that is not imported there is no model."""
    return "open_clip" in sys.modules and isinstance(tower, sys.modules["open_clip.transformer"].VisionTransformer)


def has_trunk(tower: nn.Module) -> bool:
    """Whether this is an image tower of OpenCLIP around a timm model."""
    return "open_clip" in sys.modules and isinstance(tower, sys.modules["open_clip.timm_model"].TimmModel)


def output_width(visual: nn.Module) -> int:
    """Width of what an OpenCLIP image tower returns, with or without its projection.

    Raises:
        UnsupportedError: this is no such tower.
    """
    if is_native(visual):
        return visual.ln_post.normalized_shape[0] if visual.proj is None else visual.proj.shape[1]
    if has_trunk(visual):
        trunk = visual.trunk
        layers = [layer for layer in (trunk.get_classifier(), *visual.head.modules()) if isinstance(layer, nn.Linear)]
        return layers[-1].out_features if layers else getattr(trunk, "head_hidden_size", trunk.num_features)
    if hasattr(visual, "output_dim"):  # open_clip.modified_resnet.ModifiedResNet
        return visual.output_dim
    raise UnsupportedError(f"{type(visual).__name__} is no image tower of an OpenCLIP model")


def _remove_projection(visual: nn.Module) -> None:
    """Take the projection off an OpenCLIP image tower."""
    if is_native(visual):
        visual.proj = None
    elif has_trunk(visual):
        # It is the head, or where there is none, as for EVA-02 and Perception Encoder, the classifier of the trunk.
        visual.head = nn.Identity()
        visual.trunk.reset_classifier(0)
    else:
        raise UnsupportedError(
            f"the image tower {type(visual).__name__} has no separate projection; pass projected=True to keep its "
            "features"
        )
