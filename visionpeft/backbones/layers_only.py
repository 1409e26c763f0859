"""Any timm model whose blocks have no sited form: the sites of its layers, and nothing else.

`describe_part` prefers the description by blocks and falls back on this one.

A layer site is a linear layer, a convolution or a normalisation whose weight reaches the output, which is found by
running the model once (`reach`) and not by names. What acts there changes the layer's output where its own forward is
a plain product, and else the weight that is read (`Layer.changed`), which covers convolutions in groups, with padding
as TensorFlow has it or with standardised weights, normalisations with their activation, and layers whose weight is
read without a call.

Layers are addressed by the last word of their path ("qkv", "conv1"; "0" with the word before it) or by kind:
"linears", "convolutions" (not in groups), "all" of both, "pointwise" (the 1 x 1 among the convolutions), "grouped"
(depthwise ones, too). Blocks are those that timm's `group_matcher` names, in its order.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from weakref import WeakKeyDictionary

from torch import nn

from visionpeft.backbones.dispatch import architecture, describe_model, is_known, part_of
from visionpeft.backbones.layer import Layer
from visionpeft.backbones.quantised import is_quantised
from visionpeft.backbones.reach import OURS, Reach, reach
from visionpeft.backbones.tower import Backbone, BlockSites, Tower
from visionpeft.errors import UnsupportedError
from visionpeft.sites.stand_ins import own_class

NAMED: Mapping[str, str] = {}

# model -> (its modules with their own classes, what one pass has met); not the layers, which would keep the model alive
_MET: WeakKeyDictionary[nn.Module, tuple[list, Reach]] = WeakKeyDictionary()


def describe_part(model: nn.Module) -> Backbone:
    """Describe a model that may be a part of another: by its blocks, or a timm model without sited ones by its layers.

    Raises:
        UnsupportedError: if it is neither.
    """
    try:
        return describe_model(model)
    except UnsupportedError as refusal:
        if not hasattr(model, "pretrained_cfg"):  # which timm gives to every model that it makes
            raise
        reason = str(refusal) if is_known(model) else f"{type(model).__name__} has no sited blocks{part_of(model)}"
        return layers_only(model, reason)


def layers_only(
    model: nn.Module, reason: str, block_paths: Sequence[str] | None = None, named: Mapping[str, str] = NAMED
) -> Backbone:
    """Describe a model by its layers alone; it is run once as long as it stays what it is.

    Args:
        model: the model, of timm or made like one.
        reason: why it is not described by its blocks.
        block_paths: its blocks; by default those that timm's `group_matcher` names.
        named: by path, the names of layers that are not called by the last word of it.

    Raises:
        UnsupportedError: it cannot be run, or none of its layers reaches its output.
    """
    state = [(id(each), own_class(each), _tensors_of(each)) for each in _own_modules(model)]
    met = _MET.get(model)
    if met is None or met[0] != state:
        met = _MET[model] = state, reach(model)
    return _describe(model, reason, met[1], block_paths, named)


def _own_modules(model: nn.Module) -> list[nn.Module]:
    parts = [part for name, child in model.named_children() if name not in OURS for part in child.modules()]
    return [model, *dict.fromkeys(parts)]


def _tensors_of(module: nn.Module) -> tuple:
    return tuple((name, None if p is None else p.shape) for name, p in module._parameters.items())


def _describe(
    model: nn.Module, reason: str, found: Reach, block_paths: Sequence[str] | None, named: Mapping[str, str]
) -> Backbone:
    heads, unused = _heads(model, found)
    paths = _block_paths(model) if block_paths is None else block_paths
    blocks = [BlockSites(model.get_submodule(path), None, None, None, {}) for path in paths]
    tower = Tower(
        name="visual",
        path="",
        module=model,
        blocks=blocks,
        common_width=getattr(model, "num_features", 0),
        num_prefix_tokens=0,
        layers={},
        excluded=tuple(f"{path}." for path in (*heads, *unused)),
        layers_only=reason,
        unreached=frozenset(name for name, _ in model.named_parameters() if name not in found.reached),
    )
    order = {path: number for number, path in enumerate(found.calls)}
    last = max((order[path] for path in paths if path in order), default=len(order))
    final = []
    for path, layer in _layers(model, found, (*heads, *unused)):
        index = next((i for i, block in enumerate(paths) if path.startswith(f"{block}.")), None)
        inside = path if index is None else path.removeprefix(f"{paths[index]}.")
        layer.site = named.get(path, inside.replace(".", "_"))
        layer.target = named.get(path, _short(inside))
        sites = tower.layers if index is None else blocks[index].layers
        if layer.site in sites:
            raise UnsupportedError(f"two layers of {type(model).__name__} would both be called {layer.site!r}")
        sites[layer.site] = layer
        if index is None and layer.kind == "norm" and order.get(path, -1) > last:
            final.append(layer.site)
    tower.final_norms = tuple(final)
    if not any(True for _ in tower.all_layers()):
        raise UnsupportedError(f"no linear layer, convolution or normalisation of {type(model).__name__} is reached")
    return Backbone("timm", architecture(model), model, {"visual": tower}, heads, unused_heads=unused)


def _layers(model: nn.Module, found: Reach, without: tuple[str, ...]) -> Iterator[tuple[str, Layer]]:
    """Paths and descriptions of the layers that reach the output, in the order of the model's modules."""
    for path, module in model.named_modules():
        own = path.partition(".")[0] not in OURS and not path.startswith(without or ("\0",))
        if own and f"{path}.weight" in found.reached and not is_quantised(module._parameters["weight"]):
            plain = found.calls[path] > 0 and found.reads[path] == found.calls[path]
            layer = _layer(module, own_class(module), plain)
            if layer is not None:
                yield path, layer


def _layer(module: nn.Module, kind: type[nn.Module], plain: bool) -> Layer | None:
    """The site of a layer, without its name; plain if its weight is read in its own calls alone."""
    weight, groups, changed = module._parameters["weight"], (), "always"
    if issubclass(kind, nn.Linear):
        what, groups = "linear", ("all", "linears")
        changed = "never" if plain and kind.forward is nn.Linear.forward else "always"
    elif issubclass(kind, nn.Conv2d):
        what = "conv"
        groups = ("grouped",) if module.groups > 1 else ("all", "convolutions")
        groups += ("pointwise",) if module.groups == 1 and module.kernel_size == (1, 1) else ()
        if plain and kind.forward is nn.Conv2d.forward and module.groups == 1 and module.padding_mode == "zeros":
            changed = "if needed"
    elif weight.ndim == 1 and _normalises(kind):
        what = "norm"
    else:
        return None
    bias = module if module._parameters.get("bias") is not None else None
    return Layer("", what, module, bias_owner=bias, reads="", groups=groups, changed=changed, overwritten=True)


def _normalises(kind: type[nn.Module]) -> bool:
    """Whether a class is that of a normalisation: one of torch's or timm's, which they name so."""
    return any("Norm" in each.__name__ for each in kind.__mro__ if each.__module__.startswith(("torch.", "timm.")))


def _short(path: str) -> str:
    """The last word of a path, with the one before it if it is a number."""
    words = path.split(".")
    return "_".join(words[-2:]) if words[-1].isdigit() else words[-1]


def _block_paths(model: nn.Module) -> list[str]:
    """Paths of the modules that timm's `group_matcher` names as blocks, in the order of the model's modules."""
    try:
        matcher = own_class(model).group_matcher(model, coarse=False)  # and not what stands in for it with adapters
    except (AttributeError, TypeError, NotImplementedError):  # a model that has no groups, or none of single blocks
        return []
    patterns = []
    for name, value in matcher.items() if isinstance(matcher, dict) else ():
        if "stem" not in name:
            patterns += [value] if isinstance(value, str) else [each[0] for each in value if each[1] is None]
    matches = [re.match(rf"(?:{pattern})(?=\.)", name) for name, _ in model.named_parameters() for pattern in patterns]
    paths = dict.fromkeys(match[0] for match in matches if match and match[0].rpartition(".")[2].isdigit())
    modules = dict(model.named_modules())
    return [path for path in modules if path in paths and not any(path.startswith(f"{each}.") for each in paths)]


def _heads(model: nn.Module, found: Reach) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of the classifiers that are called, and of those that are not."""
    given = model.get_classifier() if hasattr(model, "get_classifier") else None
    given = list(given) if isinstance(given, tuple | list | nn.ModuleList) else [given]
    paths = {id(module): path for path, module in model.named_modules()}
    inside = [paths[id(head)] for head in given if isinstance(head, nn.Module) and id(head) in paths]
    inside = [path for path in inside if any(True for _ in model.get_submodule(path).parameters())]
    return tuple(p for p in inside if found.calls[p]), tuple(p for p in inside if not found.calls[p])
