"""Queries of an adapter that ask in the blocks of a tower, and the head that reads what they get."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from visionpeft.adapters.attached_adapter import AttachedAdapter
from visionpeft.adapters.installation import Swaps
from visionpeft.adapters.route import Key
from visionpeft.adapters.routed_sites import RoutedSite, taken
from visionpeft.backbones.tower import BlockSites
from visionpeft.errors import UnsupportedError
from visionpeft.methods.parts.several_features import SeveralFeatures
from visionpeft.sites import HEAD, Asker, asker_of
from visionpeft.sites.routing import Routing

QUERIES = ("kv", HEAD)  # where queries are placed


class Asking:
    """The queries of one block, which ask for all samples.

    Args:
        modules: their modules.
        asker: runs them through the block.
    """

    def __init__(self, modules: Sequence[nn.Module], asker: Asker):
        self.modules = tuple(modules)
        self.asker = asker

    def __call__(self, k: torch.Tensor, v: torch.Tensor, h: torch.Tensor, remake: Callable | None) -> None:
        """Ask for what the keys k and values v (batch, heads, tokens, head width) have."""
        for module in self.modules:
            module.ask(self.asker, k, v, h, remake)


class RoutedAsking(RoutedSite):
    """The queries of one block on a batch whose rows go to several adapters: of each row, its adapter's.

    Args:
        routing: says which route is open.
        key: stands for the queries of the block.
        asker: runs them through the block.
    """

    def __init__(self, routing: Routing, key: Key, asker: Asker):
        super().__init__(routing, key)
        self.asker = asker

    def __call__(self, k: torch.Tensor, v: torch.Tensor, h: torch.Tensor, remake: Callable | None) -> None:
        """Ask for what the keys k and values v (batch, heads, tokens, head width) of its rows have."""
        for rows, acting in self._parts(k, self._route()):
            for module in acting:
                module.ask(self.asker, taken(k, rows), taken(v, rows), taken(h, rows), remake)


def asker(block: BlockSites, swaps: Swaps) -> Asker:
    """What runs queries through a block as the backbone has it."""
    return asker_of(block.module, block.attention, swaps.originals | block.swapped)


def connect_head(adapter: AttachedAdapter) -> None:
    """Let the head of an adapter read what its own queries get.

    Raises:
        UnsupportedError: it has queries and no head, or several.
    """
    queries = [placement.module for _, placement in adapter.placements if placement.add == HEAD]
    if not queries:
        return
    methods = " and ".join(type(method).__name__ for method in adapter.methods)
    heads = [adapter.get_submodule(path) for path in adapter.head_paths]
    readers = [part for head in heads for part in head.modules() if isinstance(part, SeveralFeatures)]
    if len(heads) != 1 or len(readers) != 1:
        raise UnsupportedError(
            f"{methods} asks for features that a classification head reads, which is trained with it: it needs a model "
            f"with one linear head, and head=True; here are {len(heads)} trained heads"
        )
    readers[0].gathered = queries[0].gathered


def check_asking_alone(adapters: Mapping[str, AttachedAdapter]) -> None:
    """Refuse other adapters, and anything else that is trained, beside queries that ask a frozen backbone.

    Raises:
        UnsupportedError: naming the adapter with queries.
    """
    for name, adapter in adapters.items():
        if not any(placement.add == HEAD for _, placement in adapter.placements):
            continue
        if len(adapters) > 1 or len(adapter.methods) > 1 or adapter.trained_names:
            words = " and ".join(type(method).__name__ for method in adapter.methods)
            raise UnsupportedError(
                f"the queries of adapter {name!r} ({words}) ask the frozen backbone, and its head reads what they get: "
                "it acts alone; activate no other adapter beside it, and attach it without other methods and without "
                "train="
            )
