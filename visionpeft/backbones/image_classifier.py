"""The image tower of an OpenCLIP model followed by a classification head."""

from torch import Tensor, nn

from visionpeft.backbones.dispatch import describe_model
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
        self.num_features = visual.output_dim if projected else _remove_projection(visual)
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
    visual = describe_model(model.visual)
    tower = visual.towers["visual"]
    tower.path = f"visual.{tower.path}".rstrip(".")
    heads = () if isinstance(model.head, nn.Identity) else ("head",)
    return Backbone("open_clip", visual.name, model, {"visual": tower}, heads)


def _remove_projection(visual: nn.Module) -> int:
    """Take the projection off an OpenCLIP image tower and return the width of its features."""
    if getattr(visual, "proj", None) is not None:  # open_clip.transformer.VisionTransformer
        width = visual.proj.shape[0]
        visual.proj = None
        return width
    if hasattr(visual, "trunk"):  # open_clip.timm_model.TimmModel: the projection is `head`
        visual.head = nn.Identity()
        return visual.trunk.num_features
    raise UnsupportedError(
        f"the image tower {type(visual).__name__} has no separate projection; pass projected=True to keep its features"
    )
