"""AdapterSoup: Weight Averaging to Improve Generalization of Pretrained Language Models (Chronopoulou et al., 2023).

https://arxiv.org/abs/2302.07027
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn as nn

from visionpeft.adapters.allocate import evaluating
from visionpeft.adapters.attach import plain
from visionpeft.backbones.dispatch import describe
from visionpeft.errors import ConfigurationError, DataError


@torch.no_grad()
def feature_mean(model: nn.Module, batches: Iterable[torch.Tensor | Sequence[torch.Tensor]]) -> torch.Tensor:
    """Mean over images of the features (width,) that the backbone has without adapters, in front of its head.

    What `similar_adapters` compares. Keep that of an adapter's training images with it:
    `save(model, folder, metadata={"feature_mean": feature_mean(model, loader).tolist()})`.

    Args:
        model: a model, with adapters or without; where it has no head, its output are the features.
        batches: batches of images, or tuples that begin with such a batch.
    """
    total, count, seen = 0, 0, []
    with plain(model), evaluating(model):
        heads = describe(model).heads
        layer = model.get_submodule(heads[0]) if heads else model
        take = (lambda _, inputs: seen.append(inputs[0])) if heads else (lambda *call: seen.append(call[-1]))
        register = layer.register_forward_pre_hook if heads else layer.register_forward_hook
        handle = register(take)
        try:
            device = next(model.parameters()).device
            for batch in batches:
                model((batch if isinstance(batch, torch.Tensor) else batch[0]).to(device))
                features = seen.pop()
                total, count = total + features.double().sum(dim=0), count + len(features)
        finally:
            handle.remove()
    if count == 0:
        raise DataError("feature_mean got no batch")
    return (total / count).float()


def similar_adapters(
    features: torch.Tensor, means: Mapping[str, torch.Tensor | Sequence[float]], number: int = 3
) -> dict[str, float]:
    """Equal weights of the adapters whose training images were most similar, by the cosine of feature means.

    Give them to `visionpeft.combine`, which makes the soup.

    Args:
        features: feature mean (width,) of the new images.
        means: feature mean of the training images of each adapter.
        number: how many adapters go into the soup.

    Raises:
        ConfigurationError: if there are not so many adapters, or a mean is that of another backbone.
    """
    if not 0 < number <= len(means):
        raise ConfigurationError(f"number must be between 1 and the {len(means)} adapters, not {number}")
    for name, mean in means.items():
        if len(mean) != len(features):
            raise ConfigurationError(
                f"the feature mean of {name!r} has {len(mean)} values and that of the images {len(features)}; compare "
                "those of one backbone"
            )
    similarity = {
        name: torch.cosine_similarity(features.double(), torch.as_tensor(mean).to(features).double(), dim=0).item()
        for name, mean in means.items()
    }
    chosen = sorted(similarity, key=similarity.get, reverse=True)[:number]
    return dict.fromkeys(chosen, 1 / number)
