"""Classification heads on the pooled features of a backbone."""

import math
from typing import Literal

from torch import nn

from visionpeft.errors import ConfigurationError, UnsupportedError

Head = Literal["linear", "batchnorm_linear", "layernorm_linear"]
HeadInit = Literal["truncated_normal", "zeros", "kaiming", "uniform"]


def build_head(kind: Head, in_features: int, num_classes: int, init: HeadInit = "truncated_normal") -> nn.Module:
    """Build a head: features (batch, in_features) -> logits (batch, num_classes).

    Args:
        kind: "linear"; "batchnorm_linear", a batch normalisation without scale and shift before it, as linear probes
            of masked autoencoders and AdaptFormer use it; "layernorm_linear", a layer normalisation before it.
        in_features: width of the features.
        num_classes: number of classes.
        init: the weight's initialisation. "truncated_normal" N(0, 0.02) as timm; "zeros"; "kaiming", normal over
            the fan-out with bias -log(99) as VPT; "uniform" U(+-1/sqrt(in_features)) as `nn.Linear`. Else biases are 0.
    """
    linear = nn.Linear(in_features, num_classes)
    initialise(linear, init)
    if kind == "linear":
        return linear
    if kind == "batchnorm_linear":
        return nn.Sequential(nn.BatchNorm1d(in_features, affine=False, eps=1e-6), linear)
    if kind == "layernorm_linear":
        return nn.Sequential(nn.LayerNorm(in_features), linear)
    raise ConfigurationError(f"there is no head {kind!r}; use linear, batchnorm_linear or layernorm_linear")


def initialise(linear: nn.Linear, init: HeadInit) -> None:
    """Initialise the linear layer of a head in place; see `build_head` for the names."""
    if init == "uniform":
        linear.reset_parameters()
        return
    nn.init.zeros_(linear.bias)
    if init == "truncated_normal":
        nn.init.trunc_normal_(linear.weight, std=0.02)
    elif init == "zeros":
        nn.init.zeros_(linear.weight)
    elif init == "kaiming":
        nn.init.kaiming_normal_(linear.weight, mode="fan_out")
        nn.init.constant_(linear.bias, -math.log(99))  # every class starts at a probability of 0.01
    else:
        raise ConfigurationError(
            f"there is no head initialisation {init!r}; use truncated_normal, zeros, kaiming or uniform"
        )


def replace_head(model: nn.Module, kind: Head, num_classes: int, init: HeadInit) -> None:
    """Put a new head in the place of the linear classifier of a timm model or an ImageClassifier.

    Raises:
        UnsupportedError: the model's classifier is not one linear layer.
    """
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise UnsupportedError(
            f"the classifier of {type(model).__name__} is a {type(classifier).__name__}, not a Linear"
        )
    path = next(name for name, module in model.named_modules() if module is classifier)
    model.set_submodule(path, build_head(kind, classifier.in_features, num_classes, init))
