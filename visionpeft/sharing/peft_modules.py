"""The modules of a backbone as HF peft sees them: it wraps whole modules, and acts only where they are called."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn as nn

from visionpeft.backbones.layer import Layer
from visionpeft.backbones.quantised import dequantise
from visionpeft.backbones.tower import Backbone, BlockSites, Tower
from visionpeft.backbones.unwatched import unwatched_copy, without_global_hooks
from visionpeft.backbones.whole_model import describe
from visionpeft.errors import UnsupportedError


@dataclass
class PeftModule:
    """One linear layer or convolution of a backbone.

    Args:
        path: its name in the model, which peft's files use.
        module: the module.
        tower: name of the tower it belongs to.
        block: index of its block, None outside the blocks.
        layers: the layer sites whose rows it holds, by site: one, or q, k and v.
        refused: why peft's change of it is not what it should be, None if it is.
    """

    path: str
    module: nn.Module
    tower: str
    block: int | None
    layers: dict[str, Layer] = field(default_factory=dict)
    refused: str | None = None

    def require(self) -> None:
        """Refuse a module that peft does not change as it should.

        Raises:
            UnsupportedError: with the reason.
        """
        if self.refused is not None:
            raise UnsupportedError(f"peft cannot adapt {self.path}: {self.refused}")


@dataclass(frozen=True)
class Part:
    """What acts at one site.

    Args:
        place: tower, index of the block and site.
        target: the name by which methods address the site.
        tensors: the state of the module that acts there.
        rank: for LoRA, rank of the change.
        alpha: for LoRA, numerator of its scale.
    """

    place: tuple[str, int | None, str]
    target: str
    tensors: dict[str, torch.Tensor]
    rank: int = 0
    alpha: float = 0.0


def peft_modules(model: nn.Module) -> tuple[Backbone, dict[str, PeftModule]]:
    """The described backbone and, by their names in the model, the modules that hold its linear and convolution sites.

    Call it while no adapter acts.

    Raises:
        UnsupportedError: the model has layer sites only, whose names here are not those of peft.
    """
    backbone = describe(model)
    if any(tower.layers_only is not None for tower in backbone.towers.values()):
        raise UnsupportedError(
            f"adapters of a {type(model).__name__}, which has layer sites only, are not converted from or to peft's"
        )
    paths = {id(module): path for path, module in model.named_modules()}
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    outputs = {id(attention.out_proj) for attention in attentions}
    found: dict[str, PeftModule] = {}
    for tower in backbone.towers.values():
        called = _CalledOwners(tower)
        for block, layer in tower.all_layers():
            if layer.kind == "norm":
                continue
            path = paths[id(layer.owner)]
            entry = found.setdefault(path, PeftModule(path, layer.owner, tower.name, block))
            entry.layers[layer.site] = layer
            if isinstance(layer.owner, nn.MultiheadAttention) or id(layer.owner) in outputs:
                entry.refused = (
                    "on nn.MultiheadAttention it adds the change of out_proj twice (W + 2 dW instead of W + dW) and "
                    "cannot tell q, k and v apart; adapt fc1 and fc2, or merge and save the plain model"
                )
            elif not isinstance(layer.owner, nn.Linear | nn.Conv2d):
                entry.refused = f"it has no form for the class {type(layer.owner).__name__}"
            elif block is not None and layer.site not in called(block):
                entry.refused = (
                    f"{type(tower.blocks[block].attention).__name__} reads its weight and never calls it, so that "
                    "peft's wrapper has no effect there; keep the adapter in this library's own format, or merge it"
                )
    return backbone, found


class _CalledOwners:
    """Layer sites of a block whose modules are called when the block runs, found by running each kind of block once."""

    def __init__(self, tower: Tower):
        self.tower = tower
        self.known: dict[str, set[str]] = {}

    def __call__(self, index: int) -> set[str]:
        """Names of the sites in block `index`."""
        block = self.tower.blocks[index]
        kind = repr(block.module)
        if kind not in self.known:
            self.known[kind] = self._run(block)
        return self.known[kind]

    @torch.no_grad()
    def _run(self, block: BlockSites) -> set[str]:
        block = unwatched_copy(block, block.module)
        module = dequantise(block.module).cpu().double().eval()
        called: set[str] = set()
        for site, layer in block.layers.items():
            layer.owner.register_forward_pre_hook(lambda *_, site=site: called.add(site))
        # The check draws random numbers, and must not change what the caller draws next.
        with torch.random.fork_rng(devices=[]), without_global_hooks():
            x, arguments = block.trial(self.tower.num_prefix_tokens + 4)
            module(x, **arguments)
        return called


def trained_biases(model: nn.Module, option: str, changed: Iterable[str]) -> set[str]:
    """Names of the parameters that peft trains by its option `bias`.

    Args:
        model: the backbone.
        option: "none", "all", or "lora_only" and likewise for those of the changed modules.
        changed: names of these.
    """
    every = {n for n, _ in model.named_parameters() if n.rpartition(".")[2] == "bias" and not n.startswith("peft.")}
    if option == "all":
        return every
    return set() if option == "none" else every & {f"{path}.bias" for path in changed}
