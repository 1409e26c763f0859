"""Before a model is touched: does a sited block compute what the library's block computes, and is every site live?

A written-out forward can drift from the library. Each distinct kind of block is copied and run in float64 on random
tokens, once as the library wrote it and as its sited class, bare and with a probe at every site. The outputs must
agree. At the sites an adapter uses the probes add shifts of zero, and one backward pass gives the gradients of all of
them: where a gradient is zero, nothing done at that site reaches the output. The probes also see what passes through
them, so that the order of the sites and the tensor each of them stands for are checked in the same pass.
"""

import re
from importlib.metadata import PackageNotFoundError, version
from weakref import WeakKeyDictionary

import torch
from timm.layers import DropPath

from visionpeft.backbones.quantised import dequantise
from visionpeft.backbones.tower import BlockSites, Tower
from visionpeft.backbones.unwatched import unwatched_copy, without_global_hooks
from visionpeft.errors import UnsupportedError
from visionpeft.sites import TOKEN_SITES, SitedLayer, Sites, give_class, sited_layer_class

TOLERANCE = 1e-5  # relative; library norms may compute in float32

PLAIN = (bool, int, float, str)
DROPS = re.compile(r"(: (?:Dropout|DropPath))\([^()]*\)")  # as a part of a block is described

# block -> (what it was when it was found sound, the sites that were found live then)
_SOUND: WeakKeyDictionary[torch.nn.Module, tuple[tuple, set[str]]] = WeakKeyDictionary()


@torch.no_grad()
def check_tower(tower: Tower, used: dict[int, set[str]]) -> None:
    """Check each distinct kind of block among those an adapter acts in; once for blocks that stay what they are.

    Args:
        tower: the tower.
        used: sites an adapter acts at, by index of the block; none for a block that is swapped for another reason.

    Raises:
        UnsupportedError: if a sited block computes something else than the original, or a used site has no effect.
    """
    kinds: dict[tuple, set[str]] = {}
    blocks: dict[tuple, list[tuple[BlockSites, tuple, set[str]]]] = {}
    for index, sites in used.items():
        block = tower.blocks[index]
        if block.sited_class is None or next(block.module.parameters()).is_meta:
            continue
        _require_class_forward(block)
        state = _state(block)
        checked, live = _SOUND.get(block.module, (None, set()))
        if checked == state and sites <= live:
            continue
        kind = kind_of(block.module, state[-1])
        kinds.setdefault(kind, set()).update(sites)
        blocks.setdefault(kind, []).append((block, state, live if checked == state else set()))
    if not kinds:
        return
    # The check draws random numbers, and must not change what the caller draws next.
    with torch.random.fork_rng(devices=[]), without_global_hooks():
        for kind, sites in kinds.items():
            _check_block(blocks[kind][0][0], tower, sites)
            # What an earlier check of the block as it is has found counts on, so that no site of it is checked twice.
            _SOUND.update((block.module, (state, sites | live)) for block, state, live in blocks[kind])


def _state(block: BlockSites) -> tuple:
    """What the check of a block depends on: its classes and settings, and which tensors it has, written to or not."""
    tensors = [(id(p), 0 if p.is_inference() else p._version) for p in block.module.parameters()]
    classes = [kind for module, sited in block.swapped.items() for kind in (type(module), sited)]
    return [(each, each.forward) for each in classes], tensors, _settings(block.module)


def kind_of(block: torch.nn.Module, settings: list[tuple]) -> tuple:
    """What blocks have in common of which one is checked for all: their description and their settings.

    The description says neither the class of a part nor what was set on it. The rates of dropouts and dropped paths are
    left out of both: the check runs in evaluation mode, and with dropped paths they differ in all blocks of a model.
    """
    return DROPS.sub(r"\1", repr(block)), *settings


def _require_class_forward(block: BlockSites) -> None:
    """Refuse a block or attention with a forward of its own, which hides that of any class it is given."""
    for module in block.swapped:
        if "forward" in vars(module):
            raise UnsupportedError(
                f"the forward of a {type(module).__name__} was replaced on the object itself, so that its sited form "
                "would never run; attach first, or make it a class and register it with visionpeft.backbones.dispatch"
            )


def _settings(block: torch.nn.Module) -> list[tuple]:
    """Of each part its class and what was set on it by hand, such as `fused_attn` or a forward of its own."""
    settings = []
    for path, part in block.named_modules():
        left_out = ("training", "p", "drop_prob") if type(part) in (torch.nn.Dropout, DropPath) else ("training",)
        own = {k: v for k, v in vars(part).items() if k not in left_out and _is_setting(v)}
        settings.append((path, type(part), id(vars(part).get("forward")), tuple(sorted(own.items()))))
    return settings


def _is_setting(value: object) -> bool:
    # Tuples, too: of two blocks of a Swin that print the same, one has shift_size (0, 0) and one (3, 3).
    return all(map(_is_setting, value)) if isinstance(value, tuple) else isinstance(value, PLAIN)


def _enliven(module: torch.nn.Module) -> None:
    """Add noise to every tensor that is one number throughout: what starts at zero (the norms after a branch in SwinV2,
    the layer scale of a ConvNeXt nearly so) would hide from the check what the block computes.
    """
    for parameter in module.parameters():
        if parameter.numel() and parameter.min() == parameter.max():
            parameter += 0.1 * torch.randn_like(parameter)


def _check_block(block: BlockSites, tower: Tower, used: set[str]) -> None:
    # Copied together, so that the layers still refer to the copied block.
    block = unwatched_copy(block, block.module)
    module = dequantise(block.module).cpu().double().eval().requires_grad_(False)
    for part in block.only_in_float32:
        part.float()
    x, arguments = block.trial(tower.num_prefix_tokens + 4)
    _enliven(module)
    expected = module(x, **arguments)

    sites = Sites(tower.num_prefix_tokens, tower.causal)
    sites.layout = block.layout
    for part, sited_class in block.swapped.items():
        give_class(part, sited_class)
        part.sites = sites
    bare = module(x, **arguments)  # where nothing acts, layers may be called together
    met: list[str] = []
    places = (*block.token_sites, "hidden", *block.layers)
    probes = {site: Probe(site, met, shifts=site in used) for site in places}
    for site, probe in probes.items():
        layer = block.layers.get("fc2" if site == "hidden" else site)
        if layer is not None and layer.called:
            if not isinstance(layer.owner, SitedLayer):
                give_class(layer.owner, sited_layer_class(type(layer.owner)))
            setattr(layer.owner, "entering" if site == "hidden" else "acting", (probe,))
        else:
            sites.acting[site] = (probe,)

    with torch.enable_grad():
        y = module(x, **arguments)
    original = f"{block.sited_class.__mro__[1].__module__}.{block.sited_class.__mro__[1].__name__}"
    scale = expected - x if x.shape == expected.shape else expected
    # the norm of both, which no NaN of one of them leaves out
    drift = _distance(torch.cat((bare, y.detach())), torch.cat((expected, expected)), scale)
    if not drift <= TOLERANCE:
        library = original.partition(".")[0]
        try:
            release = version({"open_clip": "open_clip_torch"}.get(library, library))
            where, remedy = f" of {library} {release}", f"use a supported version of {library}"
        except PackageNotFoundError:  # a family that the user has registered
            where, remedy = "", "correct the sited form that is registered for it"
        raise UnsupportedError(
            f"{original}{where} does not compute what its sited form computes (relative difference {drift:.1e}); "
            f"{remedy}"
        )
    _check_reach(y, [(site, probes[site]) for site in used], original)
    _check_order(met, original)
    _check_tensors(block, probes, x, y, original)


def _check_reach(y: torch.Tensor, used: list[tuple[str, "Probe"]], original: str) -> None:
    """Every shift of a used site must have a gradient; of `kv`, that of the keys and that of the values."""
    shifts = [shift for _, probe in used for shift in probe.shifts]
    # A random direction, because a sum over the output is constant after a norm.
    if shifts and y.requires_grad:
        grads = torch.autograd.grad(y, shifts, torch.randn_like(y), allow_unused=True)
    else:
        grads = [None] * len(shifts)
    live = {id(shift) for shift, grad in zip(shifts, grads, strict=True) if grad is not None and bool(grad.any())}
    for site, probe in used:
        if not probe.shifts or any(id(shift) not in live for shift in probe.shifts):
            raise UnsupportedError(f"nothing done at site {site!r} of {original} reaches its output")


def _check_order(met: list[str], original: str) -> None:
    """Tokens meet the token sites once each and in their order, on which prompts and branches rely."""
    twice = {site for site in met if met.count(site) > 1}
    if twice:
        raise UnsupportedError(f"tokens meet site {min(twice)!r} of {original} more than once")
    expected = [site for site in TOKEN_SITES if site in met]
    if met != expected:
        raise UnsupportedError(f"tokens meet the sites of {original} in the order {met} and not in that of {expected}")


def _check_tensors(block: BlockSites, probes: dict[str, "Probe"], x: torch.Tensor, y: torch.Tensor, original: str):
    """Each site must stand for what its name says, as far as that is the same in every family.

    The first site is the input and the last one the output of the block; the output at a linear site is made from its
    input by the weight rows and bias rows that are described, which merging writes to.
    """
    wrong = [
        site
        for site, tokens in (("stream_in", x), ("stream_out", y))
        if site in probes and probes[site].seen and not _same_tokens(probes[site].seen[0], tokens.detach())
    ]
    for site, layer in block.layers.items():
        if layer.kind != "linear" or not probes[site].seen:
            continue
        read, output, weight, bias = probes[site].seen
        own = layer.weight_tensor, layer.bias_tensor
        # A bias that is not stored, such as that of BEiT's keys, is one of zeros.
        same = torch.equal(weight, own[0]) and (own[1] is None or (bias is not None and torch.equal(bias, own[1])))
        made = torch.nn.functional.linear(read, weight, bias)
        if not (same and _distance(output, made, made) <= TOLERANCE):
            wrong.append(site)
    if wrong:
        raise UnsupportedError(f"site {wrong[0]!r} of {original} is put at another tensor than its name says")


def _same_tokens(tokens: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether x is these tokens (batch, tokens, width), or a map of them with channels last or first."""
    if x.ndim == 3:
        return torch.equal(tokens, x)
    return any(torch.equal(tokens, each.flatten(1, 2)) for each in (x, x.permute(0, 2, 3, 1)))


def _distance(left: torch.Tensor, right: torch.Tensor, scale: torch.Tensor) -> float:
    return ((left - right).norm() / scale.norm().clamp_min(1e-30)).item()


class Probe:
    """Changes nothing at its site, and keeps what it saw.

    Args:
        site: name of the site.
        met: where the names of the token sites are noted as tokens meet them.
        shifts: add zeros to what passes through, and keep them for their gradient.
    """

    def __init__(self, site: str, met: list[str], shifts: bool):
        self.site = site
        self.met = met
        self.adds = shifts
        self.shifts: list[torch.Tensor] = []
        self.seen: tuple[torch.Tensor | None, ...] = ()

    def __call__(self, *inputs):
        """Act as a module at a token site (x), a layer site (x, y, weight, bias) or `kv` (k, v)."""
        if self.site in TOKEN_SITES:
            self.met.append(self.site)
        self.seen = tuple(None if tensor is None else tensor.detach() for tensor in inputs)
        if len(inputs) == 2:
            k, v = inputs
            return self._shifted(k), self._shifted(v)
        return self._shifted(inputs[1] if len(inputs) == 4 else inputs[0])

    def _shifted(self, x: torch.Tensor) -> torch.Tensor:
        if not self.adds:
            return x
        self.shifts.append(torch.zeros_like(x, requires_grad=True))
        return x + self.shifts[-1]
