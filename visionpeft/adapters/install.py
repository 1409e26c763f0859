"""Puts the modules of the active adapters where they act: swaps classes, fills sites, swaps parameters and heads.

A model without active adapters has its original classes, parameters and heads.
"""

from collections import defaultdict
from collections.abc import Callable

import torch.nn as nn

from visionpeft.adapters.adapters import Adapters, AttachedAdapter
from visionpeft.adapters.key_prompts import key_prompts, without_prompts
from visionpeft.adapters.route import Routed, RoutedHead, check_routable
from visionpeft.backbones.dispatch import describe
from visionpeft.backbones.tower import Tower
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.sites import Located, OnPatches, Order, SitedLayer, Sites, order_of, sited_layer_class
from visionpeft.sites.frozen_layers import own

# (tower, block, site, where the result is added) -> modules in the order in which they act
Plan = dict[tuple[str, int | None, str, str | None], list[nn.Module]]


def install(model: nn.Module) -> None:
    """Make the model compute with the adapters that `model.peft` says are active, or route its batch."""
    # Always from the original: what was installed before is taken off first, so that nothing depends on the order in
    # which adapters were switched on and off.
    peft: Adapters = model.peft
    peft.restore()
    # A group is what acts on one part of the batch: all active adapters on all of it, or one on its samples each.
    groups = [(name,) for name in dict.fromkeys(peft.route) if name] if peft.route else [peft.active]
    if not any(groups):
        return
    backbone = describe(model)
    plans = [plan_of(peft, names) for names in groups]
    routed = None
    if peft.route is not None:
        check_routable(peft, plans, groups)
        rows = [[row for row, name in enumerate(peft.route) if (name,) == group] for group in groups]
        routed = rows, len(peft.route)
    for tower in backbone.towers.values():
        _install_tower(peft, tower, plans, routed)
    peft.recompute_blocks(model)
    _install_parameters(peft, model)
    _install_heads(peft, model, backbone.heads, groups)


def plan_of(peft: Adapters, names: tuple[str, ...]) -> Plan:
    """What acts where when these adapters are active together, in the law of order."""
    entries = defaultdict(list)
    for name in names:
        adapter: AttachedAdapter = peft[name]
        for sequence, (index, placement) in enumerate(adapter.placements):
            # Equal orders go by the names of method and adapter, so that the order of attaching has no say; only the
            # modules of one method keep the order in which it placed them.
            rank = (order_of(placement.module), type(adapter.methods[index]).__name__, name, sequence)
            entries[placement.tower, placement.block, placement.site, placement.add].append((rank, placement.module))
    return {key: [module for _, module in sorted(acting, key=lambda e: e[0])] for key, acting in entries.items()}


def _install_tower(peft: Adapters, tower: Tower, plans: list[Plan], routed) -> None:
    # here[block][site, add] holds one list of modules for each group; block None is the tower outside its blocks.
    here: dict[int | None, dict] = defaultdict(lambda: defaultdict(lambda: [[] for _ in plans]))
    for number, plan in enumerate(plans):
        for (tower_name, block, site, add), modules in plan.items():
            if tower_name == tower.name:
                here[block][site, add][number] = modules
    if tower.frames is not None and routed is not None:
        routed = *routed, tower.frames
    # Before the blocks are looked at, because it may add to the first one.
    _enter_tokens(peft, tower, here, routed)
    travelling = [_travelling(tower, plan, peft) for plan in plans]
    for index, block in enumerate(tower.blocks):
        # A block is sited if something acts in it, if prompts travel through it (its attention mask must make room for
        # them), or if an economy needs it. Every other block stays the library's.
        prompts = [inside[index] for inside in travelling]
        if index not in here and not prompts[0] and not peft.economies.need(tower, index):
            continue
        sites = Sites(tower.num_prefix_tokens, tower.causal)
        acting = here.get(index, {})
        alone = {key: groups[0] for key, groups in acting.items()} if routed is None else None
        peft.economies.apply(sites, tower, index, alone)
        # Prompts as keys and values are for one group, because they are shared by the batch, and for towers that are
        # not causal, where every token sees them. They act no more as modules and count no more as tokens.
        if alone is not None and not tower.causal:
            sites.key_prompts = key_prompts(block.module, alone)
        if sites.key_prompts is not None:
            acting = without_prompts(acting, sites.key_prompts.prompts)
            prompts = [[module for module in prompts[0] if module not in sites.key_prompts.prompts]]
        sites.extra_tokens = sum(module.num_tokens for module in prompts[0])
        # Block and attention share their sites: the attention asks for those of q, k, v and kv, the block for its
        # tokens'.
        swap(peft, block.module, block.sited_class).sites = sites
        swap(peft, block.attention, block.sited_attention_class).sites = sites
        for layer in block.economical:
            swap_layer(peft, layer)
        _fill(peft, sites, block.layers, _located(acting, sites, prompts), routed)
    _fill(peft, None, tower.layers, here.get(None, {}), routed)
    # `forward_intermediates` would hand out tokens with prompts among them, or the class token alone.
    acting = [module for sites in here.values() for groups in sites.values() for group in groups for module in group]
    if any(order_of(module) == Order.ENTER_SPAN for module in acting):
        _refuse_intermediates(peft, tower, "shallow prompts travel between the blocks; use VPT(deep=True)")
    elif peft.economies.narrows(tower):
        _refuse_intermediates(peft, tower, "class_token_only follows one token; switch it off with economise")


def _enter_tokens(peft: Adapters, tower: Tower, here: dict, routed) -> None:
    """Let act at `tokens`: in front of the norm that precedes the blocks, or, without one, first in the first block."""
    groups = here[None].pop(("tokens", None), None)
    if groups is None:
        return
    norm = tower.layers.get("norm_pre")
    if norm is None:
        first = here[0]["stream_in", None]
        first[:] = [mine + others for mine, others in zip(groups, first, strict=True)]
    else:
        swap_layer(peft, norm.owner).entering = _acting(groups, routed, False)


def _acting(groups: list[list[nn.Module]], routed, branch: bool) -> tuple:
    return tuple(groups[0]) if routed is None else (Routed(groups, branch, *routed),)


def _fill(peft: Adapters, sites: Sites | None, layers: dict, here: dict, routed) -> None:
    # A layer that is called acts by itself, on its output or, for `hidden`, on its input. The rows of a fused q, k, v
    # are no layer of their own, so what acts there is called by the attention, as at a token site.
    for (site, add), groups in here.items():
        acting = _acting(groups, routed, add is not None)
        if site == "hidden":
            swap_layer(peft, layers["fc2"].owner).entering = acting
        elif site in layers and layers[site].called:
            swap_layer(peft, layers[site].owner).acting = acting
        elif add is not None:
            sites.branches[site] = sites.branches.get(site, ()) + tuple((module, add) for module in acting)
        else:
            sites.acting[site] = acting


def swap(peft: Adapters, module: nn.Module, sited_class: type) -> nn.Module:
    """Give a module its sited class and remember the original one."""
    peft.swapped.append((module, type(module)))
    module.__class__ = sited_class
    return module


def swap_layer(peft: Adapters, layer: nn.Module) -> nn.Module:
    """Give a layer that is called its sited class, unless it has it."""
    return layer if isinstance(layer, SitedLayer) else swap(peft, layer, sited_layer_class(type(layer)))


def _located(here: dict, sites: Sites, prompts: list[list[nn.Module]]) -> dict:
    """What acts in a block, with where the tokens are for those who treat some of them apart."""

    def located(module: nn.Module, inside: list[nn.Module]) -> nn.Module | OnPatches | Located:
        if getattr(module, "patches_only", False):
            return OnPatches(module, sites.first_patch)
        place = getattr(module, "located_at", None)
        if place is None:
            return module
        # Prompts that enter later stand in front of those that are there.
        behind = [] if place == "patches" else inside[: inside.index(place) + 1]
        return Located(module, sites.first_patch - sum(each.num_tokens for each in behind))

    return {
        key: [[located(module, inside) for module in group] for group, inside in zip(groups, prompts, strict=True)]
        for key, groups in here.items()
    }


def _travelling(tower: Tower, plan: Plan, peft: Adapters) -> list[list[nn.Module]]:
    """Whose prompts travel through each block, in the order in which they entered.

    Refuses spans that overlap without one containing the other, or that shift tokens to be replaced by position.
    """
    # Spans open and close like brackets: prompts enter right after the prefix tokens, before the prompts that are there
    # already, and are removed from that place. So what leaves must be what entered last.
    owners = {p.module: (name, index) for name, adapter in peft.items() for index, p in adapter.placements}
    open_spans: list[nn.Module] = []
    travelling = []
    for index in range(tower.depth):
        enter = plan.get((tower.name, index, "stream_in", None), [])
        leave = plan.get((tower.name, index, "stream_out", None), [])
        if open_spans and any(order_of(module) == Order.REPLACE for module in enter):
            raise UnsupportedError(
                f"tokens of the {tower.name} tower cannot be replaced while shallow prompts travel through it; use "
                "VPT(deep=True)"
            )
        # Those that stay for several blocks enter before those of this block alone, as the law of order says.
        open_spans += [module for module in enter if order_of(module) == Order.ENTER_SPAN]
        travelling.append([*open_spans, *(module for module in enter if order_of(module) == Order.ENTER)])
        leaving = [owners[module] for module in leave if order_of(module) == Order.LEAVE_SPAN]
        staying = len(open_spans) - len(leaving)
        if sorted(owners[module] for module in open_spans[max(staying, 0) :]) != sorted(leaving):
            raise UnsupportedError(
                "shallow prompts of two adapters overlap in part; their block ranges must be nested or apart"
            )
        del open_spans[staying:]
    return travelling


class NoIntermediates:
    """Stands in for `forward_intermediates` while blocks give other tokens than the backbone's.

    Args:
        reason: what they give, and what to do about it.
    """

    def __init__(self, reason: str):
        self.reason = reason

    def __call__(self, *args, **kwargs):
        """Refuse."""
        raise UnsupportedError(f"forward_intermediates cannot be used while {self.reason}")


def _refuse_intermediates(peft: Adapters, tower: Tower, reason: str) -> None:
    # In the instance, and noted as swapped only so that `restore_classes` finds the module and removes it again.
    for module in tower.spanning:
        module.__dict__["forward_intermediates"] = NoIntermediates(reason)
        peft.swapped.append((module, type(module)))


def _install_parameters(peft: Adapters, model: nn.Module) -> None:
    # The trained copy stands in the model in the place of the original, which is kept aside until it is put back.
    by_parameter: dict[str, str] = {}
    for name in peft.active if peft.route is None else ():
        for parameter_name, trained in peft[name].trained_parameters():
            if parameter_name in by_parameter:
                raise ConfigurationError(
                    f"adapters {by_parameter[parameter_name]!r} and {name!r} both train {parameter_name!r}; "
                    "activate only one of them"
                )
            by_parameter[parameter_name] = name
            replace_everywhere(peft, model, model.get_parameter(parameter_name), trained)


def replace_everywhere(peft: Adapters, model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Replace a parameter in every module that holds it, so that tied parameters stay tied."""
    for path, module in model.named_modules():
        if path == "peft" or path.startswith("peft."):
            continue
        for name, parameter in module._parameters.items():
            if parameter is old:
                peft.replace(module, name, new)


def _install_heads(peft: Adapters, model: nn.Module, heads: tuple[str, ...], groups: list[tuple[str, ...]]) -> None:
    acting = [name for names in groups for name in names]
    for path in dict.fromkeys((*heads, *(path for name in acting for path in peft[name].heads))):
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        if peft.route is not None:
            peft.replace(owner, name, RoutedHead(_head_of(peft, model, path), peft.route))
            continue
        # Of several active adapters with a head, the last one classifies.
        with_head = [adapter for adapter in peft.active if path in peft[adapter].heads]
        if with_head:
            head = peft[with_head[-1]].get_submodule(path)
            peft.replace(owner, name, head)
            if isinstance(head, nn.Linear):
                # Trained, it keeps its input, which must not keep the tokens it was taken from.
                swap_layer(peft, head).entering = (own,)


def _head_of(peft: Adapters, model: nn.Module, path: str) -> Callable[[str | None], nn.Module]:
    original = model.get_submodule(path)
    return lambda name: peft[name].get_submodule(path) if name and path in peft[name].heads else original
