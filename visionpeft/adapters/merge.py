"""Merge adapters into the weights, exactly where the algebra allows it, and take them out again."""

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn as nn

from visionpeft.adapters.access import on_model
from visionpeft.adapters.adapters import Adapters, attached
from visionpeft.adapters.allocate import evaluating
from visionpeft.adapters.attach import unfreeze
from visionpeft.adapters.attached_adapter import check_allocated, own_parameter
from visionpeft.adapters.install import holders, install
from visionpeft.adapters.merged import reattach
from visionpeft.adapters.plan import plan_of
from visionpeft.adapters.resting import head_in_use
from visionpeft.adapters.unchanged import check_unchanged
from visionpeft.backbones.layer import READS, Layer
from visionpeft.backbones.quantised import computing_dtype, full_precision, is_quantised
from visionpeft.backbones.tower import Tower
from visionpeft.backbones.whole_model import describe
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.sites import Order, order_of

# Token sites that linear layers read. A module that acts there has `merge_input(weight, bias)`: weight and bias with
# which such a layer computes from the tokens as they were what it computes from the module's.
INPUTS = frozenset(READS.values())


@on_model
@torch.no_grad()
def merge(model: nn.Module, keep: bool = True) -> nn.Module:
    """Merge the active adapters: the model becomes a plain timm or OpenCLIP model that computes the same.

    Its classes and `state_dict` keys are the library's own, so that the library saves and loads it without us. The
    original weights are kept aside for `unmerge` and `detach`. Merged is what the adapters compute in evaluation mode,
    whatever mode the model is in: nothing that only training draws (`DyLoRA`'s rank of the step) is part of it.

    Args:
        model: a model with adapters; with `keep=False` also one whose adapters are merged already.
        keep: keep the original weights and all adapters. Otherwise the merged weights are the model's own from now on:
            what was trainable before the first adapter is so again, and other adapters can be attached.

    Raises:
        UnsupportedError: if an active method adds something no weight of the backbone can hold, or changes one layer of
            several that have the same weight; nothing is changed.
    """
    if not keep and "merged_peft" in model.__dict__:
        unfreeze(model, model.__dict__.pop("merged_peft"))
        return model
    peft = attached(model)
    if not peft.active or peft.route is not None:
        raise ConfigurationError("merge merges the active adapters, but none is active; call activate first")
    _check_mergeable(peft)
    check_unchanged(model, peft.active)
    peft.restore()
    try:
        with evaluating(peft):
            changes = _merged_parameters(model, peft)
        heads = _merged_heads(model, peft)
    except Exception:  # whatever failed: leave the model as it was, then raise
        install(model)
        raise
    holding = holders(model)
    for owner, name, value in changes:
        merged = nn.Parameter(value, requires_grad=False)
        for holder, slot in holding[owner._parameters[name]]:
            peft.replace(holder, slot, merged)
    for path, head in heads.items():
        parent, _, name = path.rpartition(".")
        peft.replace(model.get_submodule(parent), name, head)
    del model.peft
    if not keep:
        unfreeze(model, peft)
        return model
    # Not registered, so that the model's state_dict is the library's own.
    model.__dict__["merged_peft"] = peft
    return model


@on_model
def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`: the original weights come back byte for byte and the adapters act again.

    Raises:
        ConfigurationError: no adapters are merged.
        UnsupportedError: the model was moved to a precision that its quantised weights cannot follow to.
    """
    reattach(model)
    install(model)
    return model


def _check_mergeable(peft: Adapters) -> None:
    for name in peft.active:
        check_allocated(peft[name])
        for index, placement in peft[name].placements:
            folds = placement.site in INPUTS and placement.add is None
            if not hasattr(placement.module, "merge_input" if folds else "merge"):
                method = type(peft[name].methods[index]).__name__
                raise UnsupportedError(
                    f"{method} (adapter {name!r}) cannot be merged: what it adds at {placement.site} is no change of a "
                    "weight of the backbone; keep it attached"
                )
    for (_, block, site, _), modules in plan_of(peft, peft.active).items():
        if sum(order_of(module) == Order.RENEW for module in modules) > 1:
            raise UnsupportedError(
                f"two methods at {site} in block {block} make its weight anew from that of the backbone, and no one "
                "weight computes what both do; merge with one of their adapters active"
            )


def _merged_parameters(model: nn.Module, peft: Adapters) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """New values of the parameters that the active adapters change, as (owner, name, value)."""
    copies = {n: p for a in peft.active for n, p in peft[a].trained_parameters()}
    trained = {id(own_parameter(model, name)): copy for name, copy in copies.items()}
    values: dict[tuple[int, str], tuple[nn.Module, str, torch.Tensor]] = {}

    def value(owner: nn.Module, name: str) -> torch.Tensor:
        parameter = getattr(owner, name)
        start = full_precision(trained.get(id(parameter), parameter).detach()).double().clone()
        return values.setdefault((id(owner), name), (owner, name, start))[2]

    for path, _, name in (each.rpartition(".") for each in copies):
        value(model.get_submodule(path), name)
    towers, holding = describe(model).towers, holders(model)
    methods = dict.fromkeys(type(method).__name__ for name in peft.active for method in peft[name].methods)
    # What acts on the input of a layer is folded into what its output has become.
    plan = sorted(plan_of(peft, peft.active).items(), key=lambda entry: entry[0][2] in INPUTS)
    for (tower_name, block, site, _), modules in plan:
        tower = towers[tower_name]
        place = f"{' and '.join(methods)} at {_place(tower, block, site)}"
        if site not in INPUTS:
            _check_own(holding, tower.layer(block, site), place)
            _merge_layer(tower.layer(block, site), [module.merge for module in modules], value, place)
            continue
        if site == "attn_in" and tower.blocks[block].fills_up:
            raise UnsupportedError(
                f"{place} cannot be merged: the windows of this block are filled up with zeros, which what acts there "
                "does not see and a merged weight would change; keep it attached, or have it before the MLP alone"
            )
        readers = [layer for layer in tower.blocks[block].layers.values() if layer.reads == site]
        if not readers:
            raise UnsupportedError(f"{place} cannot be merged: no linear layer reads it directly")
        for layer in readers:
            _check_own(holding, layer, place)
            _merge_layer(layer, [_of_matrix(module.merge_input) for module in reversed(modules)], value, place)
    return [(owner, name, v.to(computing_dtype(model, owner, name))) for owner, name, v in values.values()]


def _check_own(holding: Mapping[nn.Parameter, list], layer: Layer, place: str) -> None:
    """Refuse a layer whose weight or bias is none of its own: other layers compute with it, too, or it is made anew."""
    for owner, name in ((layer.owner, layer.weight), (layer.bias_owner, layer.bias)):
        if owner is not None and name not in owner._parameters:
            raise UnsupportedError(
                f"{place} cannot be merged: {name} is no tensor of its own but made of others (a parametrisation, such "
                "as weight_norm); save and detach the adapter, call "
                "torch.nn.utils.parametrize.remove_parametrizations, and load it with check_fingerprint=False"
            )
        if owner is not None and len(holding[owner._parameters[name]]) > 1:
            raise UnsupportedError(
                f"{place} cannot be merged: other layers of the model have the same {name}, and no one tensor computes "
                "what each of them does with its adapter; keep the adapter attached"
            )


def _merged_heads(model: nn.Module, peft: Adapters) -> dict[str, nn.Module]:
    """Frozen copies of the heads in use, by path, in the precision of the model."""
    plain = (p for p in model.parameters() if p.is_floating_point() and not is_quantised(p))
    heads, dtype = {}, next(parameter.dtype for parameter in plain)
    for path in dict.fromkeys(path for name in peft.active for path in peft[name].head_paths):
        head = copy.deepcopy(peft[head_in_use(peft, path)].get_submodule(path))
        heads[path] = head.to(dtype=dtype).requires_grad_(False)
    return heads


def _merge_layer(layer: Layer, merges: list[Callable], value, place: str) -> None:
    weight = value(layer.owner, layer.weight)
    weight_rows = weight if layer.rows is None else weight[layer.rows]
    if layer.changed != "never":
        weight_rows = weight_rows.flatten(1) if weight.ndim > 2 else weight_rows
    bias_rows = None
    if layer.bias_owner is not None:
        bias = value(layer.bias_owner, layer.bias)
        bias_rows = bias if layer.bias_rows is None else bias[layer.bias_rows]
    new_weight, new_bias = weight_rows, bias_rows
    for merged in merges:
        new_weight, new_bias = merged(new_weight, new_bias)
    weight_rows.copy_(new_weight.view_as(weight_rows))
    if bias_rows is not None:
        bias_rows.copy_(new_bias)
    elif new_bias is not None and not layer.shift_is_void:
        if layer.shift_sink is None:
            raise UnsupportedError(f"{place} cannot be merged: the layer has no bias that could hold a shift")
        owner, name, index = layer.shift_sink
        value(owner, name)[index] += new_bias


def _of_matrix(merged: Callable) -> Callable:
    """`merge_input` for the weight (out, in, 1, 1) of a convolution of single pixels, too."""
    return lambda weight, bias: merged(weight.flatten(1), bias)


def _place(tower: Tower, block: int | None, site: str) -> str:
    return (
        f"{site} of the {tower.name} tower" if block is None else f"{site} in block {block} of the {tower.name} tower"
    )
