"""Puts the modules of the active adapters where they act: swaps classes, fills sites, lets trained copies be read.

A model without active adapters has its original classes; its parameters and heads stay its own all the time.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import torch.nn as nn

from visionpeft.adapters.adapters import Adapters, AttachedAdapter, join, own_parameter
from visionpeft.adapters.installation import Anatomy, Installation, of_swapped
from visionpeft.adapters.key_prompts import key_prompts, without_prompts
from visionpeft.adapters.layer_decay import GroupMatcher
from visionpeft.adapters.multiplied_tokens import check_multiplied
from visionpeft.adapters.route import Batch, Routed, RoutedHead, check_routable
from visionpeft.backbones.dispatch import describe
from visionpeft.backbones.tower import Tower
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.sites import Located, OnPatches, Order, SitedLayer, Sites, order_of, sited_layer_class
from visionpeft.sites.stand_ins import attributes_of, reads_copies, routes_heads, uses_head

MOST_KEPT = 32  # combinations of adapters whose places in the model are kept

# (tower, block, site, where the result is added) -> modules in the order in which they act
Plan = dict[tuple[str, int | None, str, str | None], list[nn.Module]]


def install(model: nn.Module, passing: bool = False) -> None:
    """Make the model compute with the adapters that `model.peft` says are active, or route its batch.

    Args:
        model: a model with adapters.
        passing: for a context that is left again: adapters that rest before and after are not looked at.
    """
    # Always from the original: what was installed before is taken off first, so that nothing depends on the order in
    # which adapters were switched on and off.
    peft: Adapters = model.peft
    peft.restore()
    # A group is what acts on one part of the batch: all active adapters on all of it, or one on its samples each.
    groups = [(name,) for name in dict.fromkeys(peft.route) if name] if peft.route else [peft.active]
    _freeze_unused(peft, passing)
    if not any(groups):
        return
    # Samples may go to the same adapters in another order: that is the same but for the batch.
    key = peft.active if peft.route is None else ("route", tuple(dict.fromkeys(peft.route)))
    made = peft.installations.pop(key, None)
    if made is None or not made.holds(peft):
        made = _decide(model, groups)
    else:
        peft.swapped = made.put_in_force()
    peft.installations[key] = made  # as the last one, so that the first one is that which was not used for longest
    if len(peft.installations) > MOST_KEPT:
        del peft.installations[next(iter(peft.installations))]
    peft.backbone = made.backbone
    peft.recompute_blocks(model)
    if made.batch is not None:
        made.batch.choose(peft.route, next(model.parameters()).device)


def _decide(model: nn.Module, groups: list[tuple[str, ...]]) -> Installation:
    """Put adapters in force in a model in which none acts."""
    peft: Adapters = model.peft
    check_unchanged(model, [name for names in groups for name in names])
    anatomy = Anatomy(model, without=peft)
    backbone = describe(model)
    plans = [plan_of(peft, names) for names in groups]
    batch, routed = None, None
    if peft.route is not None:
        check_routable(peft, plans, groups)
        batch = Batch()
        routed = [name for (name,) in groups], batch
    for tower in backbone.towers.values():
        _install_tower(peft, tower, plans, routed)
    if hasattr(model, "group_matcher"):
        model.__dict__["group_matcher"] = GroupMatcher(model)
        peft.swapped.append((model, type(model)))
    _install_parameters(peft, model)
    _install_heads(peft, model, backbone.heads, groups, batch)
    acting = {name: peft.anatomy(name) for names in groups for name in names}
    return Installation(anatomy, acting, of_swapped(peft.swapped), backbone, batch)


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
        check_multiplied(acting)
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
    """Let act at `tokens`: before the norm that precedes the blocks, or, without one, first in the first block."""
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
        # Prompts that enter later stand before those that are there.
        after = [] if place == "patches" else inside[: inside.index(place) + 1]
        return Located(module, sites.first_patch - sum(each.num_tokens for each in after))

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
    copies: dict[nn.Module, dict[str, tuple[nn.Module, str]]] = defaultdict(dict)
    for name in peft.active if peft.route is None else ():
        for parameter_name in peft[name].trained_names:
            if parameter_name in by_parameter:
                raise ConfigurationError(
                    f"adapters {by_parameter[parameter_name]!r} and {name!r} both train {parameter_name!r}; "
                    "activate only one of them"
                )
            by_parameter[parameter_name] = name
            path, _, last = f"trained.{parameter_name}".rpartition(".")
            for module, slot in holders(model, own_parameter(model, parameter_name)):
                copies[module][slot] = peft[name].get_submodule(path), last
    # The original stays where it is and keeps its `state_dict` key. Every module that holds it, tied or not, gets a
    # class whose attribute of that name gives the trained copy, which its forward then reads.
    for module, read in copies.items():
        peft.stand_in(module, reads_copies(type(module), tuple(read))).copies = read


def holders(model: nn.Module, parameter: nn.Parameter) -> Iterator[tuple[nn.Module, str]]:
    """Every module of the model that has a parameter, and the name it has there; several where it is tied."""
    for path, module in model.named_modules():
        if path != "peft" and not path.startswith("peft."):
            yield from ((module, name) for name, each in module._parameters.items() if each is parameter)


def _install_heads(
    peft: Adapters,
    model: nn.Module,
    heads: tuple[str, ...],
    groups: list[tuple[str, ...]],
    batch: Batch | None,
) -> None:
    acting = [name for names in groups for name in names]
    for path in dict.fromkeys((*heads, *(path for name in acting for path in peft[name].heads))):
        own = model.get_submodule(path)
        if peft.route is not None:
            peft.stand_in(own, routes_heads(type(own))).routed = RoutedHead(
                _head_of(peft, path), tuple(dict.fromkeys(peft.route)), batch
            )
        elif head_in_use(peft, path) is not None:
            _use_head(peft, own, peft[head_in_use(peft, path)].get_submodule(path))


def head_in_use(peft: Adapters, path: str) -> str | None:
    """Which active adapter's head is used: that of the last one."""
    return next((name for name in reversed(peft.active) if path in peft[name].heads), None)


def parameters_in_use(peft: Adapters) -> list[nn.Parameter]:
    """Parameters of the adapters that act or are routed, without heads that another one's head stands in for."""
    names = peft.active if peft.route is None else tuple(dict.fromkeys(filter(None, peft.route)))
    unused = set()
    for name in names if peft.route is None else ():
        for path in peft[name].heads:
            if head_in_use(peft, path) != name:
                unused |= set(peft[name].get_submodule(path).parameters())
    return [*dict.fromkeys(p for name in names for _, _, p in peft.anatomy(name).parameters() if p not in unused)]


def _freeze_unused(peft: Adapters, passing: bool) -> None:
    """Let `requires_grad` follow what acts: DDP waits for gradients of everything that has it.

    What was frozen before it came to rest stays frozen when it acts again.
    """
    in_use, resting = {id(parameter) for parameter in parameters_in_use(peft)}, set(peft.resting)
    used = frozenset(peft.active if peft.route is None else filter(None, peft.route))
    for name in [name for name in peft if not passing or name in used or name in peft.used]:
        for owner, key, parameter in peft.anatomy(name).parameters():
            if parameter.requires_grad:
                if id(parameter) not in in_use:
                    parameter.requires_grad_(False)
                    resting.add((name, join(owner, key)))
            elif id(parameter) in in_use and (name, join(owner, key)) in resting:
                parameter.requires_grad_(True)
                resting.remove((name, join(owner, key)))
    peft.resting, peft.used = frozenset(resting), used


def stood_in_for(model: nn.Module) -> set[nn.Parameter]:
    """The model's own parameters that do not compute now, because copies of them do."""
    active = [model.peft[name] for name in model.peft.active]
    heads = {parameter for each in active for (host,) in each.hosts.values() for parameter in host.parameters()}
    return heads | {own_parameter(model, name) for each in active for name in each.trained_names}


def remember_hosts(model: nn.Module, adapter: AttachedAdapter) -> None:
    """Remember in the place of which modules the heads of an adapter will compute.

    Raises:
        ConfigurationError: the model has no such module.
    """
    hosts = {path: _at(model, path) for path in adapter.heads}
    if missing := [path for path, host in hosts.items() if not isinstance(host, nn.Module)]:
        raise ConfigurationError(f"the adapter has a head {missing[0]!r}, but the model has no module of this name")
    adapter.hosts = {path: (host,) for path, host in hosts.items()}


def check_unchanged(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse adapters whose head or trained copies are those of another head or parameter than the model has now.

    Raises:
        ConfigurationError: naming what was changed.
    """
    for name in names:
        adapter: AttachedAdapter = model.peft[name]
        changed = [path for path, (host,) in adapter.hosts.items() if _at(model, path) is not host]
        for path, trained in adapter.trained_parameters():
            if getattr(_at(model, path), "shape", None) != trained.shape:
                changed.append(path)
        if changed:
            raise ConfigurationError(
                f"{changed[0]!r} of the model was exchanged after adapter {name!r}, which trains a copy of the old "
                "one, was attached; detach the adapter, then change the model (reset_classifier, set_input_size), then "
                "attach it"
            )


def _at(model: nn.Module, name: str) -> nn.Module | nn.Parameter | None:
    """The module or the model's own parameter of this name."""
    path, _, last = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return None
    return owner._modules.get(last, owner._parameters.get(last))


def _use_head(peft: Adapters, own: nn.Module, head: nn.Module) -> None:
    """Let a head compute with another one, layer by layer where they are built alike, so that hooks see each layer."""
    alike = type(own) is type(head) is nn.Sequential and own._modules.keys() == head._modules.keys()
    if alike:
        for mine, other in zip(own, head, strict=True):
            _use_head(peft, mine, other)
    else:
        peft.stand_in(own, uses_head(type(own), attributes_of(head))).acting = (head,)


def _head_of(peft: Adapters, path: str) -> Callable[[str | None], nn.Module | None]:
    return lambda name: peft[name].get_submodule(path) if name and path in peft[name].heads else None
