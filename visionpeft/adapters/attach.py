"""Attach adapters to a model, exchange them, and take them off again."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.nn as nn

from visionpeft.adapters.access import alone_with, on_model
from visionpeft.adapters.adapters import Adapters, attached, has_adapters, known
from visionpeft.adapters.asking import connect_head
from visionpeft.adapters.attached_adapter import AttachedAdapter
from visionpeft.adapters.block_limits import check_available
from visionpeft.adapters.install import install
from visionpeft.adapters.merged import reattach
from visionpeft.adapters.routes import check_not_routed
from visionpeft.adapters.selfcheck import check_tower
from visionpeft.adapters.sources import fill, used_by, with_sources
from visionpeft.adapters.switch import activate, plain
from visionpeft.adapters.unchanged import check_unchanged, remember_hosts
from visionpeft.backbones.made_tensors import check_own_tensors
from visionpeft.backbones.quantised import check_products
from visionpeft.backbones.tower import Backbone
from visionpeft.backbones.whole_model import describe
from visionpeft.errors import ConfigurationError, UnsupportedError, UserError, one_line
from visionpeft.methods.parts.base import Method
from visionpeft.sites import HEAD, NEXT_BLOCK, Order, order_of

SPANNING = (Order.ENTER_SPAN, Order.LEAVE_SPAN)


@torch.inference_mode(False)  # what is made within that mode could never be trained
def attach(
    model: nn.Module,
    method: Method | Sequence[Method],
    name: str = "default",
    *,
    head: bool = True,
    train: Iterable[str] = (),
) -> nn.Module:
    """Attach a method, or several stacked ones, to a model in place. The new adapter acts beside those already active.

    The first adapter freezes the model. Nothing is changed if anything is refused. Adapters that a method is over
    (`MoLE`, `AdapterFusion`) are copied into the new one, and act no more by themselves.

    Args:
        model: a timm or OpenCLIP model, not compiled.
        method: one method, or several that make one adapter together.
        name: name of the adapter, for `activate`, `route`, `save`.
        head: train a copy of the model's classification head with the adapter; the model's own head comes back when
            the adapter is switched off or detached.
        train: names of further parameters to train, as copies: a parameter ("cls_token"), a module ("norm"), or a
            pattern ("*.norm1"). They travel with the adapter.

    Returns:
        The model.

    Raises:
        UnsupportedError: if the model or a site the method needs is not supported.
        ConfigurationError: if the name is taken, or a target, block range or tower matches nothing.
    """
    methods = tuple(method) if isinstance(method, Sequence) and not isinstance(method, str) else (method,)
    for each in methods:
        if not isinstance(each, Method):
            raise ConfigurationError(f"attach needs a method such as LoRA(rank=8), not {each!r}")
        given = [name for name in each.found if getattr(each, name, None) not in (None, False)]
        if given:  # which of them, only a saved adapter says
            raise ConfigurationError(f"{type(each).__name__}: {given[0]} are found, not given; leave them out")
    words = " and ".join(type(each).__name__ for each in methods)
    used = used_by(methods)
    methods, given = with_sources(model.peft if has_adapters(model) else None, methods)
    with plain(model):
        check_own_tensors(model)  # `register` does it, too, but a head is copied before
        backbone = describe(model)
        try:
            adapter = AttachedAdapter(methods, backbone, head, tuple([train] if isinstance(train, str) else train))
        except (UserError, NotImplementedError, RecursionError):  # sentences of ours, and defects of a method's code
            raise
        except (RuntimeError, ValueError, MemoryError) as error:  # sizes and values torch refuses
            raise ConfigurationError(f"{words} cannot be made here ({one_line(error)}); choose other values") from error
    if not adapter.pending and not any(True for _ in adapter.parameters()):
        raise ConfigurationError(f"{words} trains nothing here: the model has no head, or head=False was asked for")
    fill(adapter, given)
    register(model, name, adapter, backbone)
    if used:  # they act inside the new one
        activate(model, [each for each in model.peft.active if each not in used])
    return model


def register(model: nn.Module, name: str, adapter: AttachedAdapter, backbone: Backbone, *, alone: bool = False) -> None:
    """Add a made adapter to the model and let it act, beside the active ones or alone.

    Nothing is changed if it is refused.
    """
    with alone_with(model):
        _register(model, name, adapter, backbone, alone)


def _register(model: nn.Module, name: str, adapter: AttachedAdapter, backbone: Backbone, alone: bool) -> None:
    _check_name(model, name)
    with plain(model):
        check_own_tensors(model)
        check_products(model)
        _check_sites(adapter, backbone)
    connect_head(adapter)  # refuses, so before anything is changed
    remember_hosts(model, adapter)
    if not has_adapters(model):
        model.add_module("peft", Adapters().train(model.training))
        model.peft.was_trainable = tuple(n for n, p in model.named_parameters() if p.requires_grad)
        model.requires_grad_(False)
    peft: Adapters = model.peft
    before = peft.chosen
    peft[name] = adapter
    adapter.train(model.training)
    peft.chosen = (name,) if alone else (*peft.chosen, name)
    try:
        install(model)
    except Exception:  # whatever failed: leave the model as it was, then raise
        detach(model, name)
        peft.chosen = before
        if has_adapters(model):
            install(model)
        raise


@on_model
def exchange(model: nn.Module, name: str, adapter: AttachedAdapter, backbone: Backbone) -> None:
    """Put an adapter in the place of the attached one of this name. Nothing is changed if it is refused."""
    peft, old = attached(model), attached(model)[name]
    check_unchanged(model, (name,))
    with plain(model):
        _check_sites(adapter, backbone)
    connect_head(adapter)
    remember_hosts(model, adapter)
    peft[name] = adapter
    adapter.train(old.training)
    peft.forget()
    try:
        install(model)
    except Exception:  # whatever failed: leave the model as it was, then raise
        peft[name] = old
        install(model)
        raise


@on_model
def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take off one adapter, or all of them; without any the model is what it was before the first, byte for byte.

    Args:
        model: a model with adapters, merged or not.
        name: which adapter, None for all.

    Raises:
        ConfigurationError: there is no such adapter, or a route that is open names it.
        UnsupportedError: the model was sharded, parametrised or wrapped while adapters acted.
    """
    peft = model.__dict__.get("merged_peft") or attached(model)
    peft.require_whole()
    if name is not None:
        known(peft, name)
    gone = list(peft) if name is None else [name]
    check_not_routed(peft, gone)
    if "merged_peft" in model.__dict__:
        reattach(model)
    peft.forget()
    for each in gone:
        del peft[each]
    peft.chosen = tuple(each for each in peft.chosen if each in peft)
    peft.resting = {owner: paths for owner, paths in peft.resting.items() if owner in peft}
    if len(peft) > 0:
        install(model)
        return model
    peft.restore()
    del model.peft
    unfreeze(model, peft)
    return model


def unfreeze(model: nn.Module, peft: Adapters) -> None:
    """Make trainable again what the first adapter has frozen."""
    trainable = set(peft.was_trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)


def _check_name(model: nn.Module, name: str) -> None:
    if "merged_peft" in model.__dict__:
        raise ConfigurationError(
            "the model's adapters are merged; unmerge or detach them before attaching another, or keep the merged "
            "weights for good with merge(model, keep=False)"
        )
    for part, child in model.named_children():
        for path, module in child.named_modules(prefix=part) if part != "peft" else ():
            if isinstance(module, Adapters):
                raise ConfigurationError(
                    f"an adapter is already attached to the part {path.rpartition('.')[0]!r} of this model; "
                    "attach all adapters to the same module"
                )
    if not has_adapters(model) and hasattr(model, "peft"):
        raise UnsupportedError("the model already has an attribute 'peft' that is not ours")
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ConfigurationError(f"{name!r} cannot name an adapter; use a plain word without dots")
    if has_adapters(model) and name in model.peft:
        raise ConfigurationError(f"an adapter {name!r} is already attached; detach it or choose another name")


def _check_sites(adapter: AttachedAdapter, backbone: Backbone) -> None:
    used: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for _, placement in adapter.placements:
        if placement.block is not None:
            add = {NEXT_BLOCK: "stream_out", HEAD: None}.get(placement.add, placement.add)
            used[placement.tower][placement.block].update(filter(None, (placement.site, add)))
        elif placement.site == "tokens" and "norm_pre" not in backbone.towers[placement.tower].layers:
            used[placement.tower][0].add("stream_in")
    for tower in backbone.towers.values():
        for index in filter(tower.is_queried, range(tower.depth)):
            used[tower.name][index].update()  # likewise sited, whatever acts there
    for tower, sites in used.items():
        check_available(adapter, backbone.towers[tower])
        spans = [p for _, p in adapter.placements if p.tower == tower and order_of(p.module) in SPANNING]
        for index in range(min((p.block for p in spans), default=0), max((p.block for p in spans), default=-1) + 1):
            sites[index].update()  # prompts travel through it, so that it is swapped although nothing acts in it
        check_tower(backbone.towers[tower], sites)
