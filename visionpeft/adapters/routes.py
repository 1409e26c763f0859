"""Makes a model ready for routes: what acts in it on a batch whose rows go to several adapters, beside what acts else.

Nothing that acts without a route is touched: modules get a class that asks whether a route is open in this context
(`sites.routing`), once for all routes, and what they compute with then is kept beside what they have. Adapters that
insert equally many tokens at the same places share one plan. A plan grows by the sites of each adapter that is routed
for the first time; which of them act on which rows is looked up in the route itself.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator

import torch.nn as nn

from visionpeft.adapters.adapters import Adapters
from visionpeft.adapters.alike import alike
from visionpeft.adapters.asking import QUERIES, RoutedAsking, asker, check_asking_alone
from visionpeft.adapters.block_limits import check_on_map
from visionpeft.adapters.carried_values import CARRIERS, CARRYING
from visionpeft.adapters.install import fill, swap_block
from visionpeft.adapters.installation import METHODS, Anatomy, Swapped, Swaps
from visionpeft.adapters.key_prompts import Acting, key_prompts, without_prompts
from visionpeft.adapters.library_methods import SHALLOW, know_adapters, refuse_intermediates
from visionpeft.adapters.plan import acting_in, located_in, plan_of, reading_all, travelling_prompts
from visionpeft.adapters.route import Key, Opened, Route, RoutedAdapter
from visionpeft.adapters.routed_carriers import RoutedCarriers
from visionpeft.adapters.routed_sites import RoutedHead, RoutedKeyPrompts, RoutedPixels, RoutedSite, RoutedWindows
from visionpeft.adapters.unchanged import check_unchanged
from visionpeft.backbones.tower import Backbone, Tower
from visionpeft.backbones.whole_model import describe
from visionpeft.errors import ConfigurationError, UnsupportedError, UserError
from visionpeft.sites import TOKEN_SITES, Order, SitedLayer, Sites, order_of
from visionpeft.sites.routing import Routable, Routing, routable

MOST_KEPT = 64  # routes whose rows are kept as indices on the device
_NUMBERS = itertools.count()


class RoutedPlan:
    """What routes of adapters that insert equally many tokens make of a model.

    Args:
        number: its key.
        swaps: which modules need another class for it, and what they have while such a route is open.
    """

    def __init__(self, number: int, swaps: Swaps):
        self.number = number
        self.swaps = swaps
        self.sites: dict[tuple[str, int], Sites] = {}
        self.keys: set[Key] = set()
        self.adapters: set[int] = set()


class Routes:
    """The plans of one model, and the routes that were open last.

    Args:
        routing: stands for the model.
    """

    def __init__(self, routing: Routing):
        self.routing = routing
        self.backbone: Backbone | None = None
        self.described: list[tuple[nn.Module, type, dict]] = []
        self.adapters: dict[tuple[str, bool], RoutedAdapter] = {}
        self.plans: dict[frozenset, RoutedPlan] = {}
        self.routes: OrderedDict[tuple, Route] = OrderedDict()
        self.installed: Anatomy | None = None

    def forget(self) -> None:
        """Decide anew from now on, and let go of adapters that are gone."""
        self.__init__(self.routing)

    def route(self, model: nn.Module, names: tuple[str | None, ...]) -> Route:
        """The route of these names, with the model ready for it.

        Raises:
            ConfigurationError: if the head of an adapter was exchanged in the model.
            UnsupportedError: if an adapter cannot act on single rows exactly.
        """
        ready = self.routing.installed and self.installed is not None and self.installed.holds()
        known, attached = self.routes.get(names), model.peft._modules
        same = known is not None and all(attached.get(name) is each.root for name, each in known.adapters.items())
        if not ready or not same:
            with self.routing.changing:
                known = self._made_ready(model, names)
                self.routes[names] = known
                while len(self.routes) > MOST_KEPT:
                    self.routes.popitem(last=False)
        return known

    def reopen(self, model: nn.Module) -> None:
        """Make the model ready again for the routes that are open, after what acts without a route has changed."""
        for opened in self.routing.opened:
            try:
                opened.route = self.route(model, opened.names)
            except UserError as error:
                opened.refusal = f"the route that is open can no longer be computed: {error}"

    def _made_ready(self, model: nn.Module, names: tuple[str | None, ...]) -> Route:
        peft: Adapters = model.peft
        peft.require_whole()
        originals: dict[nn.Module, type] = {}
        for module, original, _ in peft.swapped:
            originals.setdefault(module, original)
        described = _described(model, peft, originals)
        if self.backbone is None or described != self.described:
            for opened in self.routing.opened if self.backbone is not None else ():
                opened.refusal = "modules of the model were exchanged while this route was open; open it again"
            self.forget()
            self.backbone, self.described = describe(model), described
        named = dict.fromkeys(filter(None, names))
        adapters = {name: self._adapter(model, name, True) for name in named}
        if len({adapter.inserted for adapter in adapters.values()}) > 1:  # prompts of some have to be tokens
            adapters = {name: self._adapter(model, name, False) for name in named}
        _check_lengths(adapters, None in names)
        inserted = next((adapter.inserted for adapter in adapters.values()), frozenset())
        plan = self.plans.get(inserted)
        if plan is None:
            plan = self.plans[inserted] = self._plan(model, Swaps(originals))
        changed = [
            self._add(peft, plan, name, adapter)
            for name, adapter in adapters.items()
            if id(adapter) not in plan.adapters
        ]
        if any(changed) or not self.routing.installed or self.installed is None or not self.installed.holds():
            self._put(model, originals)
        return Route(names, adapters, plan.number)

    def _adapter(self, model: nn.Module, name: str, keyed: bool) -> RoutedAdapter:
        """An adapter as routes know it.

        Args:
            model: the model.
            name: its name.
            keyed: let prompts be keys and values alone where they can.
        """
        peft: Adapters = model.peft
        known, root = self.adapters.get((name, keyed)), peft[name]
        if known is not None and known.root is root:
            return known
        _check_routable(name, root, self.backbone)
        check_asking_alone({name: root})
        check_unchanged(model, (name,))
        plan = plan_of(peft, (name,))
        counts = {key: sum(getattr(module, "num_tokens", 0) for module in modules) for key, modules in plan.items()}
        owned, chains, prompts_of = set(root.modules()), {}, {}
        for tower in self.backbone.towers.values():
            travelling = travelling_prompts(tower, plan, peft, (name,))
            for block, here in acting_in(tower, plan).items():
                inside = [] if block is None else travelling[block]
                prompts = _key_prompts(tower, block, here) if keyed else []
                if prompts:
                    prompts_of[tower.name, block] = prompts
                    here = without_prompts(here, prompts)
                    inside = [module for module in inside if module not in prompts]
                    chains[tower.name, block, "prompts", None] = tuple(prompts)
                    counts[tower.name, block, "prompts", None] = sum(module.num_tokens for module in prompts)
                first_patch = tower.num_prefix_tokens + sum(module.num_tokens for module in inside)
                for (site, add), modules in ((key, modules) for key, modules in here.items() if modules):
                    chains[tower.name, block, site, add] = located_in(modules, first_patch, inside)
        same = {}
        for key, chain in chains.items():
            found = tuple(alike(acts, owned) for acts in chain)
            same[key] = None if None in found else found
        made = RoutedAdapter(root, frozenset((k, n) for k, n in counts.items() if n), chains, same, owned, prompts_of)
        self.adapters[name, keyed] = made
        return made

    def _plan(self, model: nn.Module, swaps: Swaps) -> RoutedPlan:
        plan = RoutedPlan(next(_NUMBERS), swaps)
        for tower in self.backbone.towers.values():
            for index in range(tower.depth):
                if model.peft.economies.need(tower, index):
                    self._sites(model.peft, plan, tower, index, [])
            if model.peft.economies.narrows(tower):
                refuse_intermediates(swaps, tower, "class_token_only follows one token; switch it off with economise")
        for path in self.backbone.heads:
            self._route_head(plan, path)
        know_adapters(swaps, model)
        return plan

    def _route_head(self, plan: RoutedPlan, path: str) -> None:
        head = self.backbone.model.get_submodule(path)
        if "routed" not in plan.swaps.given.get(head, {}):
            plan.swaps.swap(head, plan.swaps.kind(head), routed=RoutedHead(self.routing, path))

    def _sites(self, peft: Adapters, plan: RoutedPlan, tower: Tower, index: int, prompts: list[nn.Module]) -> Sites:
        sites = plan.sites.get((tower.name, index))
        if sites is None:
            sites = plan.sites[tower.name, index] = Sites(tower.num_prefix_tokens, tower.causal)
            sites.layout = tower.blocks[index].layout
            peft.economies.apply(sites, tower, index, None)
            swap_block(plan.swaps, tower.blocks[index], sites)
        check_on_map(tower.blocks[index], (), prompts)
        sites.extra_tokens = sum(module.num_tokens for module in prompts)
        return sites

    def _add(self, peft: Adapters, plan: RoutedPlan, name: str, adapter: RoutedAdapter) -> bool:
        """Add the sites of an adapter to a plan; whether there were new ones."""
        acting, before = plan_of(peft, (name,)), _size(plan)
        for tower in self.backbone.towers.values():
            travelling = [
                [module for module in inside if module not in adapter.key_prompts.get((tower.name, index), ())]
                for index, inside in enumerate(travelling_prompts(tower, acting, peft, (name,)))
            ]
            here = acting_in(tower, acting)
            blocks = {key[1] for key in adapter.chains if key[0] == tower.name}
            for index in range(tower.depth):
                if index in blocks or travelling[index]:
                    sites = self._sites(peft, plan, tower, index, travelling[index])
                    modules = (module for modules in here.get(index, {}).values() for module in modules)
                    sites.reading_all = sites.reading_all or reading_all(tower, modules)
            for key in adapter.chains:
                if key[0] == tower.name and key not in plan.keys:
                    plan.keys.add(key)
                    self._put_routed(plan, tower, key)
            spans = [m for key, modules in acting.items() if key[0] == tower.name for m in modules]
            if any(order_of(module) == Order.ENTER_SPAN for module in spans):
                refuse_intermediates(plan.swaps, tower, SHALLOW)
            if any(key[0] == tower.name and key[2:] == CARRIERS for key in acting):
                refuse_intermediates(plan.swaps, tower, CARRYING)
        for path in adapter.root.head_paths:
            self._route_head(plan, path)
        plan.adapters.add(id(adapter))
        return _size(plan) > before or len(plan.adapters) == 1

    def _put_routed(self, plan: RoutedPlan, tower: Tower, key: Key) -> None:
        """Put what acts at a site of a tower by the adapter of each row in its place."""
        _, index, site, add = key
        block = None if index is None else tower.blocks[index]
        sites = None if index is None else plan.sites[tower.name, index]
        if site == "prompts":
            sites.key_prompts = RoutedKeyPrompts(self.routing, key, block.module, tower.frames)
        elif (site, add) == QUERIES:
            sites.asking = RoutedAsking(self.routing, key, asker(block, plan.swaps))
        elif (site, add) == CARRIERS:
            ends = {"first": index == 0, "last": index == tower.depth - 1}
            sites.carriers = RoutedCarriers(self.routing, key, tower.frames, **ends)
        else:
            kind = RoutedSite
            if block is not None and block.on_map:  # whose keys and values are those of its windows
                kind = RoutedWindows if site == "kv" else RoutedPixels if site in TOKEN_SITES else RoutedSite
            layers = tower.layers if block is None else block.layers
            fill(plan.swaps, sites, layers, {(site, add): (kind(self.routing, key, tower.frames),)})

    def _put(self, model: nn.Module, originals: dict[nn.Module, type]) -> None:
        """Give modules the classes that ask for routes, and what they compute with in each plan."""
        peft: Adapters = model.peft
        plans = self.plans.values()
        for module in dict.fromkeys((*originals, *(module for plan in plans for module in plan.swaps.kinds))):
            active = module.unrouted if isinstance(module, Routable) else type(module)
            original = originals.get(module, active)
            given = {plan.number: plan.swaps.given[module] for plan in plans if module in plan.swaps.given}
            kinds = [plan.swaps.kinds[module] for plan in plans if module in plan.swaps.kinds]
            routed = next((kind for kind in kinds if kind is not original), None)
            names = {name for each in given.values() for name in each}
            names |= {name for name in ("sites", *METHODS) if name in vars(module)}
            if any(kind is not None and issubclass(kind, SitedLayer) for kind in (active, routed)):
                names |= {"acting", "entering"}
            # The class comes last: whoever computes in another thread meanwhile has all that it asks for.
            module.__dict__.update(routing=self.routing, plans=given)
            object.__setattr__(module, "__class__", routable(active, routed, tuple(sorted(names))))
            if module not in originals:
                peft.swapped.append(Swapped(module, original, vars(module).get("forward")))
        self.routing.installed = True
        self.installed = Anatomy(model, without=peft)


def _size(plan: RoutedPlan) -> int:
    return sum(map(len, plan.swaps.given.values())) + len(plan.swaps.kinds)


def _key_prompts(tower: Tower, block: int | None, here: Acting) -> list[nn.Module]:
    """The modules of a block whose prompts can be keys and values alone, and are seen by nothing else that acts."""
    if block is None or tower.causal:
        return []
    found = key_prompts(tower.blocks[block], here)
    return [] if found is None or found.at_entrance or found.at_attention else found.prompts


def _described(model: nn.Module, peft: Adapters, originals: dict[nn.Module, type]) -> list[tuple]:
    """The modules of a model with their own classes and their children."""
    modules = model.named_modules(memo={peft})
    return [(module, originals.get(module, type(module)), dict(module._modules)) for _, module in modules]


def _check_routable(name: str, adapter: nn.Module, backbone: Backbone) -> None:
    """Refuse an adapter that cannot act on single rows exactly.

    Raises:
        UnsupportedError: if it trains parameters of the backbone itself, or acts on the text tower or on one that has
            layer sites only.
    """
    methods = ", ".join(type(method).__name__ for method in adapter.methods)
    if adapter.trained_names:
        raise UnsupportedError(
            f"adapter {name!r} ({methods}) trains {adapter.trained_names[0]!r} and others of the backbone, which "
            "all samples of a batch share; use it for a whole batch"
        )
    if any(len(getattr(module, "tasks", ())) > 1 for module in adapter.modules()):
        raise UnsupportedError(
            f"adapter {name!r} ({methods}) acts by the task of an image, which a route does not hand on; use it for a "
            "whole batch, within visionpeft.of_tasks"
        )
    if any(backbone.towers[placement.tower].layers_only is not None for _, placement in adapter.placements):
        raise UnsupportedError(
            f"adapter {name!r} ({methods}) acts on a model that has layer sites only, which does not say which rows of "
            "a layer are those of an image; use it for a whole batch"
        )
    if any(placement.tower == "text" for _, placement in adapter.placements):
        raise UnsupportedError(f"adapter {name!r} ({methods}) acts on the text tower, whose batch is not images")


def _check_lengths(adapters: dict[str, RoutedAdapter], plain: bool) -> None:
    """Refuse adapters that insert tokens that other rows do not have."""
    lengths = [adapter.inserted for adapter in adapters.values()] + [frozenset()] * plain
    if any(inserted != lengths[0] for inserted in lengths):
        names = ", ".join(name for name, adapter in adapters.items() if adapter.inserted)
        raise UnsupportedError(
            f"{names} inserts tokens or keys, so that the samples of this batch would differ in length; "
            "use it for a whole batch, or with adapters that insert equally many"
        )


def routes_of(peft: Adapters) -> Routes:
    """The routes of a model."""
    with peft.routing.changing:
        if peft.routing.routes is None:
            peft.routing.routes = Routes(peft.routing)
    return peft.routing.routes


def named(peft: Adapters, name: str) -> Iterator[Opened]:
    """The open routes that name an adapter."""
    return (opened for opened in peft.routing.opened if name in opened.names)


def check_not_routed(peft: Adapters, names: list[str]) -> None:
    """Refuse to take off adapters that an open route names.

    Raises:
        ConfigurationError: if one does.
    """
    for name in names:
        if any(True for _ in named(peft, name)):
            raise ConfigurationError(f"adapter {name!r} is named by a route that is open; leave the route first")
