"""The layers whose weights a method changes, named by its `targets`."""

from collections.abc import Iterator, Sequence

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Tower
from visionpeft.errors import ConfigurationError, nearest
from visionpeft.methods.parts.addressing import Overrides
from visionpeft.methods.parts.base import Method, blocks_of, require


def target_layers(method: Method, tower: Tower, kinds: Sequence[str] = ("linear",)) -> list[tuple[int | None, Layer]]:
    """The layers of the method's blocks that its `targets` name, each with the index of its block or None outside.

    Args:
        method: has the fields `targets` and `blocks`.
        tower: where it is to act.
        kinds: kinds of layers the method can act on.

    Raises:
        ConfigurationError: if a target names no such layer.
    """
    blocks = blocks_of(method, tower)
    layers = [
        (i, layer)
        for i, layer in tower.all_layers()
        if _fits(layer, kinds) and (tower.between_stages(layer.site) if i is None else i) in (None, *blocks)
    ]
    available = {layer.target for _, layer in layers} | {group for _, layer in layers for group in layer.groups}
    why = "" if tower.layers_only is None else f" (layer sites only: {tower.layers_only})"
    for target in method.targets:
        if target not in available:
            raise ConfigurationError(
                f"{type(method).__name__}: target {target!r} matches no layer; this backbone has "
                f"{nearest(target, available)}{why}"
            )
    chosen = [(index, layer) for index, layer in layers if layer.named_by(method.targets)]
    for _, layer in chosen:
        if layer.kind == "conv" and layer.changed == "never" and layer.owner.groups > 1:
            raise ConfigurationError(
                f"{type(method).__name__}: target {layer.target!r} is a convolution of single channels, whose kernels "
                "have no matrix of channels to change"
            )
    return chosen


def _fits(layer: Layer, kinds: Sequence[str]) -> bool:
    """Whether a layer is of one of these kinds; a convolution whose weight can be changed is a matrix, too."""
    matrix = layer.kind == "conv" and layer.changed != "never"
    return layer.kind in kinds or (matrix and "linear" in kinds)


def ranked_layers(method: Method, tower: Tower) -> Iterator[tuple[int, Layer, int, float]]:
    """The target layers of a low-rank change, each with the index of its block, its rank and its scale alpha / rank.

    Args:
        method: has the fields `targets`, `blocks`, `rank`, `overrides` and `alpha`, which is None for a scale of 1.
        tower: where it is to act.

    Raises:
        ConfigurationError: if a target or an override names no such layer.
    """
    ranks = Overrides(method.rank, method.overrides, tower, method.targets, f"{type(method).__name__} overrides")
    for index, layer in target_layers(method, tower):
        rank = ranks.at(index, layer.named_by(method.targets))
        yield index, layer, rank, 1.0 if method.alpha is None else method.alpha / rank


def require_targets(method: Method) -> None:
    """Refuse `targets` that names none."""
    require(len(method.targets) > 0, method, "targets must be a list of names")


def require_low_rank(method: Method) -> None:
    """Refuse fields `rank`, `overrides`, `dropout` and `targets` that make no low-rank change of layers."""
    ranks = [method.rank, *method.overrides.values()]
    require(all(rank > 0 for rank in ranks), method, "rank must be a positive integer")
    require(0 <= method.dropout < 1, method, f"dropout must be in [0, 1), not {method.dropout}")
    require_targets(method)
