"""A weighted combination of attached adapters as a new adapter: soups, and arithmetic with tasks.

Which adapters make a soup: Chronopoulou et al., AdapterSoup: Weight Averaging to Improve Generalization of Pretrained
Language Models, 2023, https://arxiv.org/abs/2302.07027
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn as nn

from visionpeft.adapters.adapters import attached, known
from visionpeft.adapters.allocate import evaluating
from visionpeft.adapters.attach import register
from visionpeft.adapters.attached_adapter import AttachedAdapter, check_allocated, method_keys, nest
from visionpeft.adapters.head_layout import head_layout
from visionpeft.adapters.stages import check_last_stage
from visionpeft.adapters.storage import folded
from visionpeft.adapters.switch import activate, plain, use
from visionpeft.backbones.whole_model import describe
from visionpeft.errors import ConfigurationError, DataError
from visionpeft.methods.parts.base import weighted_sum


@torch.no_grad()
def combine(model: nn.Module, weights: Mapping[str, float], name: str, *, head: bool = True) -> nn.Module:
    """Make one adapter out of several of the same method, and activate it alone. It is trained and saved like others.

    What it is depends on the method:

    * `LoRA`, `AdaLoRA`, `SPT`: the sum of the changes of weights, sum_i w_i dW_i, exactly, by putting ranks one after
      another; A and B are not averaged apart, which would give another change;
    * `BitFit`, `PaFi`, `FishMask`, `ChildTuning`, `LayerNormTuning`, `LastBlocks`, `FullFineTuning`, and parameters
      named in `train`: the backbone's own value plus sum_i w_i times what adapter i has added to it, exactly;
    * other methods: the weighted mean of their parameters, by definition, with weights that add up to 1. It is a
      sensible adapter if those it is made from started from the same values or have come close to each other.

    Weights may be negative, as in task arithmetic. Heads are averaged with the weights, which then must add up to 1,
    and must tell the same classes apart in the same order, of which only the number can be checked.
    Sources: Chronopoulou et al., AdapterSoup, 2023; Ilharco et al., Editing Models with Task Arithmetic, 2023.

    Args:
        model: a model with adapters.
        weights: weight of each adapter by name; `similar_adapters` gives those of a soup.
        name: name of the new adapter.
        head: combine the heads, too; otherwise the new adapter has none, and the model's own head is used.

    Raises:
        ConfigurationError: if the adapters cannot be combined; nothing is changed.
    """
    peft = attached(model)
    try:
        factors = [float(weight) for weight in weights.values()]
    except (AttributeError, TypeError, ValueError):  # a list, or no numbers
        factors = []
    if not factors or not all(map(math.isfinite, factors)):
        raise ConfigurationError(
            f"combine needs a finite weight for at least one adapter, as {{'a': 0.5, 'b': 0.5}}, not {weights!r}"
        )
    adapters: list[AttachedAdapter] = [peft[known(peft, each)] for each in weights]
    for adapter in adapters:
        check_allocated(adapter)
        check_last_stage(adapter)
    first = adapters[0]
    words = {" and ".join(type(method).__name__ for method in adapter.methods): None for adapter in adapters}
    if len(words) > 1 or any(adapter.train_names != first.train_names for adapter in adapters):
        raise ConfigurationError(
            f"adapters of one method, with the same `train`, can be combined, not {', '.join(words)} of "
            f"{', '.join(weights)}"
        )
    saved = [folded(adapter) for adapter in adapters]
    methods, tensors = [], {}
    for key, *same in zip(method_keys(saved[0][0]), *(own for own, _ in saved), strict=True):
        parts = [_below(f"{key}.", values) for _, values in saved]
        method, combined = same[0].combine(same, parts, factors)
        methods.append(method)
        tensors |= {f"{key}.{path}": tensor for path, tensor in combined.items()}
    with plain(model):
        backbone = describe(model)
        made = AttachedAdapter(tuple(methods), backbone, head=False, train=first.train_names)
        for path, base in made.trained_parameters():
            changes = [adapter.get_parameter(f"trained.{path}").double() - base.double() for adapter in adapters]
            moved = base.double() + sum(w * change for w, change in zip(factors, changes, strict=True))
            tensors[f"trained.{path}"] = moved.to(base)
    if head:
        made.head_paths = first.head_paths
        for path, layer in _heads(adapters, weights).items():
            nest(made, path, layer)
            tensors |= {f"{path}.{key}": tensor for key, tensor in layer.state_dict().items()}
    made.load_state_dict(tensors)
    with use(model, None):
        register(model, name, made, backbone)
    activate(model, name)
    return model


def _below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _heads(adapters: list[AttachedAdapter], weights: Mapping[str, float]) -> dict[str, nn.Module]:
    """Weighted means of the heads, by path."""
    first = adapters[0]
    layouts = [{path: head_layout(adapter.get_submodule(path)) for path in adapter.head_paths} for adapter in adapters]
    if any(layout != layouts[0] for layout in layouts):
        raise ConfigurationError(
            f"the heads of {', '.join(weights)} differ in kind or number of classes; combine with head=False"
        )
    if first.head_paths and not math.isclose(sum(weights.values()), 1, abs_tol=1e-6):
        raise ConfigurationError(
            f"heads are averaged, so the weights must add up to 1, not {sum(weights.values()):g}; "
            "combine with head=False"
        )
    heads = {}
    for path in first.head_paths:
        heads[path] = copy.deepcopy(first.get_submodule(path))
        states = [adapter.get_submodule(path).state_dict() for adapter in adapters]
        heads[path].load_state_dict(weighted_sum(states, list(weights.values())))
    return heads


@torch.no_grad()
def feature_mean(model: nn.Module, batches: Iterable[torch.Tensor | Sequence[torch.Tensor]]) -> torch.Tensor:
    """Mean over images of the features (width,) that the backbone has without adapters, before its head.

    What `similar_adapters` compares. Keep that of an adapter's training images with it:
    `save(model, folder, metadata={"feature_mean": feature_mean(model, loader).tolist()})`.

    Args:
        model: a model, with adapters or without; where it has no head, its output are the features.
        batches: batches of images, or tuples that begin with such a batch.

    Raises:
        DataError: there is no batch.
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
