"""Attach adapters to a model, choose which of them act, and take them off again."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager

import torch
import torch.nn as nn

from visionpeft.adapters.access import alone_with, beside_others, on_model, uncompiled
from visionpeft.adapters.adapters import Adapters, AttachedAdapter
from visionpeft.adapters.asking import connect_head
from visionpeft.adapters.block_limits import check_available
from visionpeft.adapters.install import check_unchanged, freeze_unused, install, remember_hosts
from visionpeft.adapters.route import Opened
from visionpeft.adapters.routes import check_not_routed, routes_of
from visionpeft.adapters.selfcheck import check_tower
from visionpeft.adapters.sources import fill, used_by, with_sources
from visionpeft.backbones.made_tensors import check_own_tensors
from visionpeft.backbones.quantised import check_product, check_products, is_quantised
from visionpeft.backbones.tower import Backbone
from visionpeft.backbones.whole_model import describe
from visionpeft.errors import ConfigurationError, UnsupportedError, UserError, nearest, one_line
from visionpeft.methods.parts.base import Method
from visionpeft.sites import HEAD, NEXT_BLOCK, Order, order_of
from visionpeft.sites.routing import OPEN

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
        check_own_tensors(model)
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
    """Take off one adapter, or all of them; without any the model is what it was before the first, byte for byte."""
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


@on_model
def activate(model: nn.Module, names: str | Sequence[str]) -> nn.Module:
    """Let exactly these adapters act. Of several with a head, the last one's head is used."""
    _choose(model, names)
    return model


@on_model
def disable(model: nn.Module) -> nn.Module:
    """Let no adapter act: the model computes as it did before the first was attached."""
    _choose(model, ())
    return model


@contextmanager
def use(model: nn.Module, names: str | Sequence[str] | None):
    """Within the context, let exactly these adapters act, or none for None. Call `backward` inside it, too.

    Other threads that call `use` or `route` wait until the context ends; one that calls the model outside of any such
    context is not held up, and computes with whatever acts. Within a route, the route stands aside.
    """
    inner = uncompiled(model)
    with alone_with(inner):
        peft = attached(inner)
        before = peft.chosen
        unrouted = OPEN.set(((peft.routing, None), *OPEN.get()))
        try:
            _choose(inner, names or (), passing=True)
            yield model
        finally:
            OPEN.reset(unrouted)
            peft.chosen = before
            install(inner, passing=True)


@contextmanager
def route(model: nn.Module, names: Sequence[str | None]):
    """Within the context, sample i of a batch goes through adapter names[i], or through the plain backbone for None.

    Row i of the result is what that adapter alone gives. Call `backward` inside the context, too. The route is seen
    in this context alone (`contextvars`): other threads may be within routes of their own at the same time, and a
    thread outside of any computes with the active adapters. What changes the model (`use`, `attach`, `detach` and
    others) waits until the routes of other threads end. `requires_grad` of the adapters is the model's, so that
    entered with gradients a route counts for all threads: train in one.

    Raises:
        ConfigurationError: if no names are given.
        UnsupportedError: if an adapter cannot act on single rows exactly.
    """
    route = tuple(names) if isinstance(names, Iterable) and not isinstance(names, str) else ()
    if not route:
        raise ConfigurationError(
            f"route needs a list with the name of an adapter, or None, for each sample of the batch, not {names!r}; to "
            "let one adapter, or none, act on a whole batch call use"
        )
    inner = uncompiled(model)
    with beside_others(inner):
        peft = attached(inner)
        for name in dict.fromkeys(filter(None, route)):
            known(peft, name)
        opened = Opened(routes_of(peft).route(inner, route), trains=torch.is_grad_enabled())
        _note(peft, opened, peft.routing.opened.append)
        routed = OPEN.set(((peft.routing, opened), *OPEN.get()))
        try:
            yield model
        finally:
            OPEN.reset(routed)
            _note(peft, opened, peft.routing.opened.remove)


def _note(peft: Adapters, opened: Opened, change: Callable[[Opened], None]) -> None:
    """Note that a route was opened or left; one with gradients decides what is frozen."""
    with peft.routing.changing:
        change(opened)
        if opened.trains:
            freeze_unused(peft, passing=True)


def has_adapters(model: nn.Module) -> bool:
    """Whether adapters are attached to this model."""
    return isinstance(getattr(model, "peft", None), Adapters)


def attached(model: nn.Module) -> Adapters:
    """The adapters of a model.

    Raises:
        ConfigurationError: if it has none, or they are merged.
    """
    if has_adapters(model):
        return model.peft
    if "merged_peft" in model.__dict__:
        raise ConfigurationError("the adapters are merged; call unmerge first")
    raise ConfigurationError(f"no adapter is attached to this model{_elsewhere(model)}")


def _elsewhere(model: nn.Module) -> str:
    """The end of a sentence that refuses a model without adapters: which part of it has some."""
    for path, part in model.named_modules():
        if path and (has_adapters(part) or "merged_peft" in vars(part)):
            return f"; its part {path!r} has some: give that part"
    return ""


def known(peft: Adapters, name: str) -> str:
    """The name, if an adapter has it.

    Raises:
        ConfigurationError: if none has.
    """
    if name not in peft:
        raise ConfigurationError(f"there is no adapter {name!r}; attached are {nearest(name, peft)}")
    return name


def reattach(model: nn.Module) -> None:
    """Make merged adapters part of the model again; the next `install` gives it back its own weights.

    Raises:
        ConfigurationError: if no adapters are merged.
        UnsupportedError: the model was moved to a precision that its quantised weights cannot follow to.
    """
    peft: Adapters | None = model.__dict__.get("merged_peft")
    if peft is None:
        raise ConfigurationError(f"the model has no merged adapters{_elsewhere(model)}")
    moved = [
        (original, getattr(owner, name))
        for owner, name, original, _ in peft.replaced
        if not isinstance(original, nn.Module) and is_quantised(original)
    ]
    for original, now in moved:
        try:
            check_product("unmerge", original.detach().to(now.device, now.dtype), now.dtype)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"the model was moved to {str(now.dtype).removeprefix('torch.')} while it was merged, to which its own "
                f"{type(original).__name__} weights cannot follow; move it back first"
            ) from error
    del model.__dict__["merged_peft"]
    # Merged adapters are not registered, so they did not follow the model to another device.
    peft.to(next(model.parameters()).device)
    if peft.training != model.training:  # nor to another mode
        peft.train(model.training)
    for owner, name, original, _ in peft.replaced:  # nor did the originals to another precision
        now = getattr(owner, name)
        if isinstance(original, nn.Module):
            original.to(next((parameter.dtype for parameter in now.parameters()), None))
        elif is_quantised(original):
            # As `model.to` does it, which keeps the parameter and puts new integers and scales into it.
            holder = nn.Module()
            holder.register_parameter("original", original)
            holder.to(now.device, now.dtype)
        else:
            original.data = original.data.to(now.dtype)
    model.add_module("peft", peft)


def _choose(model: nn.Module, names: str | Sequence[str], passing: bool = False) -> None:
    peft = attached(model)
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        known(peft, name)
    before = peft.chosen
    peft.chosen = tuple(dict.fromkeys(names))
    try:
        install(model, passing)
    except Exception:  # whatever failed: leave the model as it was, then raise
        peft.chosen = before
        install(model)
        raise


@contextmanager
def plain(model: nn.Module):
    """Within the context the model computes without adapters, whether it has any or not."""
    with alone_with(model):
        peft = model.peft if has_adapters(model) else None
        if peft is None or not (peft.chosen or peft.swapped):
            yield model
            return
        before, peft.routing.suspended = peft.routing.suspended, True
        try:
            with use(model, None):
                yield model
                peft.routing.suspended = before
        finally:
            peft.routing.suspended = before


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
