"""Puts the modules of the active adapters where they act: swaps classes, fills sites, lets trained copies be read.

A model without active adapters has its original classes; its parameters and heads stay its own all the time.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch.nn as nn

from visionpeft.adapters.adapters import Adapters
from visionpeft.adapters.asking import QUERIES, Asking, asker, check_asking_alone
from visionpeft.adapters.attached_adapter import own_parameter
from visionpeft.adapters.block_limits import check_available, check_on_map
from visionpeft.adapters.carried_values import CARRIERS, CARRYING
from visionpeft.adapters.installation import Anatomy, Installation, Swaps
from visionpeft.adapters.key_prompts import key_prompts, without_prompts
from visionpeft.adapters.library_methods import SHALLOW, know_adapters, refuse_fusing, refuse_intermediates
from visionpeft.adapters.multiplied_tokens import check_multiplied
from visionpeft.adapters.plan import Plan, acting_in, located_in, plan_of, reading_all, travelling_prompts
from visionpeft.adapters.resting import freeze_unused, head_in_use
from visionpeft.adapters.unchanged import check_unchanged
from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import BlockSites, Tower
from visionpeft.backbones.whole_model import describe
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.sites import Carriers, OnPixels, Order, Sites, order_of
from visionpeft.sites.changed_weights import CHANGED, changes_weights, has_statistics, keeps_statistics
from visionpeft.sites.stand_ins import attributes_of, reads_copies, uses_head

MOST_KEPT = 32  # combinations of adapters whose places in the model are kept


def install(model: nn.Module, passing: bool = False) -> None:
    """Make the model compute with the adapters that `model.peft` says are active, where no route is open.

    Args:
        model: a model with adapters.
        passing: for a context that is left again: adapters that rest before and after are not looked at.
    """
    # Always from the original: what was installed before is taken off first, so that nothing depends on the order in
    # which adapters were switched on and off.
    peft: Adapters = model.peft
    peft.restore()
    freeze_unused(peft, passing)
    if peft.chosen:
        made = peft.installations.pop(peft.chosen, None)
        if made is None or not made.holds(peft):
            made = _decide(model)
        peft.installations[peft.chosen] = made  # as the last one, so that the first was not used for longest
        if len(peft.installations) > MOST_KEPT:
            del peft.installations[next(iter(peft.installations))]
        peft.swapped = made.put_in_force()
        peft.backbone = made.backbone
        peft.recompute_blocks(model)
    # The last call of what other modules of this package do, which import this one.
    if peft.routing.opened and not peft.routing.suspended:
        peft.routing.routes.reopen(model)


def _decide(model: nn.Module) -> Installation:
    """What the chosen adapters make of a model in which none acts."""
    peft: Adapters = model.peft
    names = peft.chosen
    check_unchanged(model, names)
    check_asking_alone({name: peft[name] for name in names})
    anatomy = Anatomy(model, without=peft)
    backbone = describe(model)
    for name in names:  # the model may have been changed since they were attached
        for tower in backbone.towers.values():
            check_available(peft[name], tower)
    plan, swaps = plan_of(peft, names), Swaps()
    for tower in backbone.towers.values():
        _install_tower(swaps, peft, tower, plan)
    know_adapters(swaps, model)
    _install_parameters(swaps, peft, model)
    _install_heads(swaps, peft, model, backbone.heads)
    refuse_fusing(swaps, model)
    swapped = [(module, swaps.original(module), kind, swaps.given[module]) for module, kind in swaps.kinds.items()]
    return Installation(anatomy, {name: peft.anatomy(name) for name in names}, swapped, backbone)


def _install_tower(swaps: Swaps, peft: Adapters, tower: Tower, plan: Plan) -> None:
    acting = acting_in(tower, plan)
    if tower.layers_only is not None:
        trained = set(peft.modules())  # a head that is trained learns the statistics of its normalisation, too
        for module in filter(has_statistics, [each for each in tower.module.modules() if each not in trained]):
            swaps.swap(module, keeps_statistics(swaps.kind(module)))
    # Before the blocks are looked at, because it may add to the first one.
    travelling = travelling_prompts(tower, plan, peft, peft.chosen)
    for index, block in enumerate(tower.blocks):
        # A block is sited if something acts in it, if prompts travel through it (its attention mask must make room for
        # them), if queries of a head go through it (they are no patches), or if an economy needs it. Every other block
        # stays the library's.
        prompts, here = travelling[index], acting.get(index, {})
        needed = tower.is_queried(index) or peft.economies.need(tower, index)
        if index not in acting and not prompts and not needed:
            continue
        sites = Sites(tower.num_prefix_tokens, tower.causal)
        sites.layout = block.layout
        sites.reading_all = reading_all(tower, (module for modules in here.values() for module in modules))
        check_multiplied(here)
        peft.economies.apply(sites, tower, index, here)
        # Prompts as keys and values are for towers that are not causal, where every token sees them. They act no more
        # as modules and count no more as tokens.
        if not tower.causal and tower.layers_only is None:
            sites.key_prompts = key_prompts(block, here)
        if sites.key_prompts is not None:
            here = without_prompts(here, sites.key_prompts.prompts)
            prompts = [module for module in prompts if module not in sites.key_prompts.prompts]
        check_on_map(block, here, prompts)
        sites.extra_tokens = sum(module.num_tokens for module in prompts)
        swap_block(swaps, block, sites)
        located = {key: located_in(modules, sites.first_patch, prompts, sites) for key, modules in here.items()}
        if queries := located.pop(QUERIES, None):
            sites.asking = Asking(queries, asker(block, swaps))
        if carriers := located.pop(CARRIERS, None):
            sites.carriers = Carriers(carriers, first=index == 0, last=index == tower.depth - 1)
        fill(swaps, sites, block.layers, located)
    fill(swaps, None, tower.layers, {key: tuple(modules) for key, modules in acting.get(None, {}).items()})
    # `forward_intermediates` would hand out tokens with prompts among them, or the class token alone.
    if any(
        order_of(module) == Order.ENTER_SPAN
        for sites in acting.values()
        for group in sites.values()
        for module in group
    ):
        refuse_intermediates(swaps, tower, SHALLOW)
    elif any(CARRIERS in sites for sites in acting.values()):
        refuse_intermediates(swaps, tower, CARRYING)
    elif peft.economies.narrows(tower):
        refuse_intermediates(swaps, tower, "class_token_only follows one token; switch it off with economise")


def swap_block(swaps: Swaps, block: BlockSites, sites: Sites) -> None:
    """Give a block and what is in it their sited classes.

    Block and attention share their sites: the attention asks for those of q, k, v and kv, the block for its tokens'.
    """
    if block.sited_class is None:  # nor are its layers economical: some act by their weight alone
        return
    for module, sited_class in block.swapped.items():
        swaps.swap(module, sited_class, sites=sites)
    for layer in block.economical:
        swaps.swap_layer(layer)


def fill(
    swaps: Swaps, sites: Sites | None, layers: dict[str, Layer], here: dict[tuple[str, str | None], tuple]
) -> None:
    """Put what acts at (site, add) in its place."""
    # A layer that is called acts by itself, on its output or, for `hidden`, on its input. The rows of a fused q, k, v
    # are no layer of their own, so what acts there is called by the attention, as at a token site.
    for (site, add), acting in here.items():
        if site == "hidden":
            entering = tuple(map(OnPixels, acting)) if layers["fc2"].channels_first else acting
            swaps.swap_layer(layers["fc2"].owner, entering=entering)
        elif site == "tokens":
            swaps.swap_layer(layers["norm_pre"].owner, entering=acting)
        elif site in layers and changes_weight(layers[site], acting):
            change_weight(swaps, layers[site], acting)
        elif site in layers and layers[site].called:
            swaps.swap_layer(layers[site].owner, acting=acting)
        elif add is not None:
            sites.branches[site] = sites.branches.get(site, ()) + tuple((module, add) for module in acting)
        else:
            sites.acting[site] = acting
            if site in layers and isinstance(layers[site].owner, nn.Linear):  # hooks on it see what acts at its rows
                swaps.swap_layer(layers[site].owner)


def changes_weight(layer: Layer, acting: Iterable[nn.Module]) -> bool:
    """Whether what acts at a layer changes the weight that is read, and not the output."""
    on_outputs = layer.kind != "conv" or all(getattr(module, "on_images", False) for module in acting)
    return layer.changed == "always" or (layer.changed == "if needed" and not on_outputs)


def change_weight(swaps: Swaps, layer: Layer, acting: tuple[nn.Module, ...]) -> None:
    """Let the weight and bias of a layer be read as what acts makes of them.

    Raises:
        UnsupportedError: something acts that does more than change the weight and bias.
    """
    for module in acting:
        what = type(module).__name__
        if not hasattr(module, "merge"):
            raise UnsupportedError(f"{what} acts on outputs, but at {layer.site} only the weight can be changed")
        if getattr(getattr(module, "dropout", None), "p", 0) > 0:
            raise UnsupportedError(
                f"{what} cannot drop inputs at {layer.site}, where it changes the weight itself; use dropout=0"
            )
    names = tuple(name for name in CHANGED if layer.owner._parameters.get(name) is not None)
    swaps.swap(layer.owner, changes_weights(swaps.kind(layer.owner), names), acting=acting)


def _install_parameters(swaps: Swaps, peft: Adapters, model: nn.Module) -> None:
    # The trained copy stands in the model in the place of the original, which is kept aside until it is put back.
    by_parameter: dict[str, str] = {}
    copies: dict[nn.Module, dict[str, tuple[nn.Module, str]]] = defaultdict(dict)
    holding = holders(model) if any(peft[name].trained_names for name in peft.chosen) else {}
    for name in peft.chosen:
        for parameter_name in peft[name].trained_names:
            if parameter_name in by_parameter:
                raise ConfigurationError(
                    f"adapters {by_parameter[parameter_name]!r} and {name!r} both train {parameter_name!r}; "
                    "activate only one of them"
                )
            by_parameter[parameter_name] = name
            path, _, last = f"trained.{parameter_name}".rpartition(".")
            for module, slot in holding[own_parameter(model, parameter_name)]:
                copies[module][slot] = peft[name].get_submodule(path), last
    # The original stays where it is and keeps its `state_dict` key. Every module that holds it, tied or not, gets a
    # class whose attribute of that name gives the trained copy, which its forward then reads.
    for module, read in copies.items():
        swaps.swap(module, reads_copies(swaps.kind(module), tuple(read)), copies=read)


def holders(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Every module of the model that has a parameter, and the name it has there; several where it is tied."""
    found = defaultdict(list)
    parts = [child for name, child in model.named_children() if name != "peft"]
    for module in [model, *dict.fromkeys(module for part in parts for module in part.modules())]:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[parameter].append((module, name))
    return found


def _install_heads(swaps: Swaps, peft: Adapters, model: nn.Module, heads: tuple[str, ...]) -> None:
    for path in dict.fromkeys((*heads, *(path for name in peft.chosen for path in peft[name].head_paths))):
        if head_in_use(peft, path) is not None:
            _use_head(swaps, model.get_submodule(path), peft[head_in_use(peft, path)].get_submodule(path))


def stood_in_for(model: nn.Module) -> set[nn.Parameter]:
    """The model's own parameters that do not compute now, because copies of them do."""
    active = [model.peft[name] for name in model.peft.active]
    heads = {parameter for each in active for (host,) in each.hosts.values() for parameter in host.parameters()}
    return heads | {own_parameter(model, name) for each in active for name in each.trained_names}


def _use_head(swaps: Swaps, own: nn.Module, head: nn.Module) -> None:
    """Let a head compute with another one, layer by layer where they are built alike, so that hooks see each layer."""
    alike = type(own) is type(head) is nn.Sequential and own._modules.keys() == head._modules.keys()
    if alike:
        for mine, other in zip(own, head, strict=True):
            _use_head(swaps, mine, other)
    else:
        swaps.swap(own, uses_head(swaps.kind(own), attributes_of(head)), acting=(head,))
