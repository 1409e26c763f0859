"""Before a model is touched: does a sited block compute what the library's block computes, and is every site live?

A written-out forward can drift from the library. Each distinct kind of block is copied, run in float64 on random tokens
as the library wrote it and as its sited class, with a module that changes nothing at every site; then each site that
an adapter uses is disturbed and must change the output.
"""

import copy
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

import torch

from visionpeft.backbones.quantised import dequantise
from visionpeft.backbones.tower import BlockSites, Tower
from visionpeft.errors import UnsupportedError
from visionpeft.sites import TOKEN_SITES, SitedLayer, Sites, sited_layer_class

TOLERANCE = 1e-5  # relative; library norms may compute in float32


@torch.no_grad()
def check_tower(tower: Tower, used: dict[int, set[str]]) -> None:
    """Check each distinct kind of block among those an adapter acts in.

    Args:
        tower: the tower.
        used: sites an adapter acts at, by index of the block.

    Raises:
        UnsupportedError: if a sited block computes something else than the original, or a used site has no effect.
    """
    kinds: dict[tuple, set[str]] = {}
    examples: dict[tuple, BlockSites] = {}
    for index, sites in used.items():
        block = tower.blocks[index]
        if next(block.module.parameters()).is_meta:
            continue
        kind = (repr(block.module),)
        kinds.setdefault(kind, set()).update(sites)
        examples.setdefault(kind, block)
    # The check draws random numbers, and must not change what the caller draws next.
    with torch.random.fork_rng(devices=[]):
        for kind, sites in kinds.items():
            _check_block(examples[kind], tower, sites)


def _check_block(block: BlockSites, tower: Tower, used: Iterable[str]) -> None:
    # Copied together, so that the layers still refer to the copied block.
    block = copy.deepcopy(block)
    module = dequantise(block.module).cpu().double().eval().requires_grad_(False)
    arguments = block.probe(tower.num_prefix_tokens + 4)
    tokens = arguments.pop("num_tokens", tower.num_prefix_tokens + 4)
    x = torch.randn(2, tokens, tower.width, dtype=torch.float64)
    expected = module(x, **arguments)

    sites = Sites(tower.num_prefix_tokens, tower.causal)
    module.__class__, block.attention.__class__ = block.sited_class, block.sited_attention_class
    module.sites = block.attention.sites = sites
    names = [*TOKEN_SITES, "kv", "hidden", *block.layers]
    probes = {site: Probe(site) for site in names}
    for site, probe in probes.items():
        layer = block.layers.get("fc2" if site == "hidden" else site)
        if layer is not None and layer.called:
            if not isinstance(layer.owner, SitedLayer):
                layer.owner.__class__ = sited_layer_class(type(layer.owner))
            setattr(layer.owner, "entering" if site == "hidden" else "acting", (probe,))
        else:
            sites.acting[site] = (probe,)

    def difference(y: torch.Tensor) -> float:
        return ((y - expected).norm() / (expected - x).norm().clamp_min(1e-30)).item()

    original = f"{block.sited_class.__mro__[1].__module__}.{block.sited_class.__mro__[1].__name__}"
    drift = difference(module(x, **arguments))
    if not drift <= TOLERANCE:
        library = original.partition(".")[0]
        raise UnsupportedError(
            f"{original} of {_with_version(library)} does not compute what its sited form computes "
            f"(relative difference {drift:.1e}); use a supported version of {library}"
        )
    for site in used:
        probes[site].disturb = True
        effect = difference(module(x, **arguments))
        probes[site].disturb = False
        if not effect > 0:
            raise UnsupportedError(f"nothing done at site {site!r} of {original} reaches its output")


def _with_version(library: str) -> str:
    """The name of a library and its version; a family may also come from a module that was never installed."""
    try:
        return f"{library} {version({'open_clip': 'open_clip_torch'}.get(library, library))}"
    except PackageNotFoundError:
        return library


class Probe:
    """Changes nothing at its site, or adds noise to what passes through it."""

    def __init__(self, site: str):
        self.site = site
        self.disturb = False

    def __call__(self, *inputs):
        """Act as a module at a token site (x), a layer site (x, y, weight, bias) or `kv` (k, v)."""
        if len(inputs) == 2:
            k, v = inputs
            return k, self._noisy(v)
        return self._noisy(inputs[1] if len(inputs) == 4 else inputs[0])

    def _noisy(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x) if self.disturb else x
