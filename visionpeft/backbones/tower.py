"""What a backbone looks like to a method: towers of blocks, and the layers whose weights it may act on."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn as nn

from visionpeft.backbones.frames import Frames
from visionpeft.backbones.quantised import has_rows
from visionpeft.errors import UnsupportedError
from visionpeft.sites import TOKEN_SITES

BETWEEN = "downsample."  # begins the names of layers between stages, before the number of the stage they lead to

ENTERING = ("stream_in", "attn_in")  # the token sites before the attention

# target of a layer -> site whose tokens it takes
READS = dict.fromkeys(("q", "k", "v", "gate"), "attn_in") | {"fc1": "mlp_in", "fc2": "hidden"}


@dataclass
class Layer:
    """The rows of a weight and bias that make the output of one layer site.

    Args:
        site: name of the site: "q", "fc1_g", "norm1", "patch_embed".
        kind: "linear", "conv" or "norm".
        owner: module that holds the weight.
        weight: name of the weight parameter in `owner`.
        bias_owner: module that holds the bias parameter, or None if this layer has none.
        bias: name of the bias parameter in `bias_owner`.
        rows: rows of a fused weight, or None for all.
        bias_rows: rows of a fused bias, or None for all.
        called: whether `owner` is called, so that its class can be swapped; otherwise the attention reads its weight.
        target: the name users address it by, where it differs from the site.
        shift_sink: (module, parameter name, index) where a constant shift of the output can be folded into when the
            layer has no bias, such as the position embedding after a patch convolution.
        shift_is_void: whether a constant shift of the output changes nothing. So it is for keys that are neither
            rotated nor normalised: it adds the same to all scores of a query.
        reads: the site whose tokens the layer takes as they are, by default that of its name; "" for none.
        channels_first: whether its output is (batch, out, rows, columns); by default so for convolutions alone.
        groups: further targets that address it with others of its kind.
        changed: when what acts there changes the weight that is read, instead of the output: "never"; "if needed",
            where something acts that can do nothing else; or "always", for layers that do more than multiply, or whose
            weight is read without a call.
        overwritten: whether what follows may overwrite the output in place, so that nothing may keep it.
    """

    site: str
    kind: str
    owner: nn.Module
    weight: str = "weight"
    bias_owner: nn.Module | None = None
    bias: str = "bias"
    rows: slice | None = None
    bias_rows: slice | None = None
    called: bool = True
    target: str = ""
    shift_sink: tuple[nn.Module, str, tuple] | None = None
    shift_is_void: bool = False
    reads: str | None = None
    channels_first: bool | None = None
    groups: tuple[str, ...] = ()
    changed: Literal["never", "if needed", "always"] = "never"
    overwritten: bool = False

    def __post_init__(self):
        if self.channels_first is None:
            self.channels_first = self.kind == "conv"
        self.target = self.target or self.site
        if self.reads is None:
            self.reads = READS.get(self.target, "")
        if self.bias_owner is None and self.called and getattr(self.owner, self.bias, None) is not None:
            self.bias_owner = self.owner
        weight = getattr(self.owner, self.weight)
        if not has_rows(weight):
            raise UnsupportedError(
                f"{type(self.owner).__name__} keeps its weight as a {type(weight).__name__} of torchao, of which no "
                "rows can be read; quantise with Int8WeightOnlyConfig, IntxWeightOnlyConfig or Float8WeightOnlyConfig"
            )
        if weight.is_complex():
            raise UnsupportedError(f"{type(self.owner).__name__} has a complex weight, beside which nothing is trained")

    @property
    def weight_tensor(self) -> torch.Tensor:
        """The weight rows: (out, in) for linear, (out, in, kernel, kernel) for conv, (width,) for norm."""
        weight = getattr(self.owner, self.weight)
        return weight if self.rows is None else weight[self.rows]

    @property
    def matrix(self) -> torch.Tensor:
        """The weight rows as (out, in); of a convolution, in are the values that make one of its output."""
        weight = self.weight_tensor
        return weight.flatten(1) if weight.ndim > 2 else weight

    @property
    def bias_tensor(self) -> torch.Tensor | None:
        """The bias rows (out,), or None."""
        if self.bias_owner is None:
            return None
        bias = getattr(self.bias_owner, self.bias)
        return bias if self.bias_rows is None else bias[self.bias_rows]

    @property
    def trailing(self) -> tuple[int, ...]:
        """What follows (out,) in the shape by which a value for each channel meets the output."""
        return (1, 1) if self.channels_first else ()

    @property
    def out_features(self) -> int:
        """Width of the layer's output."""
        return self.weight_tensor.shape[0]

    @property
    def in_features(self) -> int:
        """Width of the layer's input; for a convolution the number of values that make one of its output."""
        return math.prod(self.weight_tensor.shape[1:])

    def named_by(self, targets: Iterable[str]) -> str | None:
        """The first of some targets that means this layer, or None."""
        return next((target for target in targets if target == self.target or target in self.groups), None)


@dataclass
class BlockSites:
    """One block of a tower.

    Args:
        module: the library's block.
        sited_class: the subclass of the block's class whose forward offers the sites; None for a block of a tower
            that has layer sites only.
        attention: the attention module inside it, None if it has none.
        sited_attention_class: likewise for the attention.
        layers: the layer sites by name.
        probe: makes one more call argument set for the self-check: `probe(num_tokens) -> kwargs` of the forward. It may
            hold "x", the input itself, and "num_tokens", another number of tokens.
        activation: the activation between the layers of the MLP, if it is one without parameters.
        knows_positions: whether its attention has positions, rotary or relative, which stand for all patches in order.
        width: width of its token stream; by default that of the tower.
        grid: rows and columns of its patches in images of the tower's own size, None if it has none.
        on_map: whether it takes and gives maps, (batch, rows, columns, width) or (batch, width, rows, columns), whose
            pixels are its tokens. What acts in it is told their rows and columns.
        token_sites: the token sites that it has, and "kv" if it has that.
        further: attentions beside the first one, which read the stream by norms of their own, so that prompts have no
            one place among their keys.
        entering_width: width of the tokens that enter and that the attention reads, of a block that makes fewer and
            wider tokens of them.
        fills_up: whether its windows may be filled up with zeros, which are keys and values as pixels are.
        layout: what the flow through the block needs to know of where its tokens lie, if not their own shape says it.
        beside: whether attention and MLP are beside each other and what they give is scaled and added to the stream
            together, so that at stream_mid it still is what has entered.
        only_in_float32: parts of it that compute in float32 whatever their input is, and take no weights but such.
    """

    module: nn.Module
    sited_class: type[nn.Module] | None
    attention: nn.Module | None
    sited_attention_class: type[nn.Module] | None
    layers: dict[str, Layer]
    probe: Callable[[int], dict] = field(default=lambda num_tokens: {})
    activation: nn.Module | None = None
    knows_positions: bool = False
    width: int | None = None
    grid: tuple[int, int] | None = None
    on_map: bool = False
    token_sites: tuple[str, ...] = (*TOKEN_SITES, "kv")
    further: tuple[nn.Module, ...] = ()
    entering_width: int | None = None
    fills_up: bool = False
    layout: object = None
    beside: bool = False
    only_in_float32: tuple[nn.Module, ...] = ()

    @property
    def swapped(self) -> dict[nn.Module, type[nn.Module]]:
        """The block and its attention, with their sited classes."""
        if self.sited_class is None:
            return {}
        attentions = () if self.attention is None else (self.attention, *self.further)
        return {self.module: self.sited_class} | dict.fromkeys(attentions, self.sited_attention_class)

    def width_at(self, site: str) -> int:
        """Width of the tokens at a token site."""
        return self.entering_width or self.width if site in ENTERING else self.width

    def narrows(self, site: str, add: str | None) -> bool:
        """Whether what is read at a site are more tokens than those to which it is added."""
        return self.entering_width is not None and site in ENTERING and add in TOKEN_SITES and add not in ENTERING

    @property
    def num_heads(self) -> int:
        """Number of heads of the queries, as the library calls it."""
        return self.attention.heads if hasattr(self.attention, "heads") else self.attention.num_heads

    @property
    def attention_width(self) -> int:
        """Width of keys and values, all heads together."""
        return self.layer("v").out_features

    def layer(self, site: str) -> Layer:
        """The layer at a site.

        Raises:
            UnsupportedError: the block has no such layer.
        """
        if site not in self.layers:
            raise UnsupportedError(
                f"blocks of class {type(self.module).__name__} have no layer {site!r}; they have "
                f"{', '.join(self.layers)}"
            )
        return self.layers[site]

    def trial(self, num_tokens: int) -> tuple[torch.Tensor, dict]:
        """A random input in float64 and the other arguments of the forward, for a copy of the block that is tried.

        Args:
            num_tokens: how many tokens it has, unless the block needs another number of them, or a map.
        """
        arguments = self.probe(num_tokens)
        tokens, x = arguments.pop("num_tokens", num_tokens), arguments.pop("x", None)
        x = torch.randn(2, tokens, self.width_at("stream_in"), dtype=torch.float64) if x is None else x
        return x, arguments

    def has(self, site: str) -> bool:
        """Whether it has a site."""
        return site in self.token_sites or site in self.layers or (site == "hidden" and "fc2" in self.layers)

    @property
    def economical(self) -> list[nn.Module]:
        """The layers whose sited class keeps less for the backward pass, also where nothing acts."""
        layers = [layer.owner for layer in self.layers.values() if layer.called]
        return layers if self.activation is None else [*layers, self.activation]


@dataclass
class Tower:
    """A stack of blocks.

    Args:
        name: "visual" or "text".
        path: where it sits in the model, "" for the model itself.
        module: the module at that path.
        blocks: its blocks in order.
        common_width: width of the token stream, which its blocks then have; None if they have widths of their own.
        num_prefix_tokens: tokens before the patches (class, registers); for text the start token.
        layers: layer sites outside the blocks: "patch_embed", "norm_pre", "norm", "fc_norm", and between stages
            "downsample.1/norm", "downsample.1/reduction" before the blocks of stage 1.
        patch_size: height and width of a patch in pixels, None for text.
        causal: whether attention is masked to the past.
        spanning: modules whose `forward_intermediates` cannot be used while prompts stay for several blocks.
        final_norms: names of the layers that normalise after the last block.
        excluded: prefixes of parameter names in `module` that belong to a head or to another tower.
        grid_size: rows and columns of patches in images of the tower's own size, None if it has none; its blocks then
            have it, too.
        frames: how many consecutive images of a batch make one clip, None if each is a sample of its own.
        pools_class_token: whether after the last block only the first token is read.
        class_token: whether the first token is a class token, by default where there are tokens before the patches;
            register tokens may be there without one.
        stages: how many blocks each stage has, of a tower whose width or grid changes between stages.
        layers_only: why its blocks have no sites but those of layers, None if they are sited.
        unreached: names in `module` of parameters that the forward does not compute with.
        queried_blocks: through how many of the last blocks tokens of a head may go, which are no patches.
        masks_padding: whether images of a batch may be filled up with patches, which a mask keeps from counting.
    """

    name: str
    path: str
    module: nn.Module
    blocks: list[BlockSites]
    common_width: int | None
    num_prefix_tokens: int
    layers: dict[str, Layer]
    patch_size: tuple[int, int] | None = None
    causal: bool = False
    spanning: tuple[nn.Module, ...] = ()
    final_norms: tuple[str, ...] = ("norm", "fc_norm")
    excluded: tuple[str, ...] = ()
    grid_size: tuple[int, int] | None = None
    frames: Frames | None = None
    pools_class_token: bool = False
    class_token: bool | None = None
    stages: tuple[int, ...] = ()
    layers_only: str | None = None
    unreached: frozenset[str] = frozenset()
    queried_blocks: int = 0
    masks_padding: bool = False

    def __post_init__(self):
        if self.class_token is None:
            self.class_token = self.num_prefix_tokens > 0
        for block in self.blocks:
            block.width = block.width or self.common_width
            block.grid = block.grid or self.grid_size

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def is_queried(self, block: int) -> bool:
        """Whether tokens of a head may go through a block."""
        return block >= self.depth - self.queried_blocks

    @property
    def width(self) -> int:
        """Width of the token stream.

        Raises:
            UnsupportedError: it differs between blocks.
        """
        return self.width_of(range(self.depth))

    @property
    def attention_width(self) -> int:
        """Width of keys and values, all heads together.

        Raises:
            UnsupportedError: it differs between blocks, or they have no attention.
        """
        return self._same("attention_width", range(self.depth))

    def width_of(self, blocks: Iterable[int]) -> int:
        """The width of the token stream that all these blocks have.

        Raises:
            UnsupportedError: they have several.
        """
        return self._same("width", blocks)

    def attention_width_of(self, blocks: Iterable[int]) -> int:
        """The width of keys and values that all these blocks have; likewise."""
        return self._same("attention_width", blocks)

    def _same(self, name: str, blocks: Iterable[int]) -> int:
        found = [*dict.fromkeys(getattr(self.blocks[index], name) for index in blocks)]
        if len(found) > 1:
            raise UnsupportedError(
                f"the blocks of the {self.name} tower have widths {', '.join(map(str, found))}, and what is shared "
                "between blocks, or reads several of them, has one; choose the blocks of one stage, such as "
                "blocks='stage:2', if there is such a field"
            )
        return found[0]

    def between_stages(self, site: str) -> int | None:
        """Index of the first block after a layer that is between stages; None for another layer outside the blocks."""
        if not site.startswith(BETWEEN):
            return None
        stage, _, _ = site.removeprefix(BETWEEN).partition("/")
        return sum(self.stages[: int(stage)])

    def belongs_to(self, site: str) -> int:
        """Index of the block with which a layer outside the blocks is chosen: the last one for norms after it, the next
        one for a layer between stages, or else the first.
        """
        return self.depth - 1 if site in self.final_norms else self.between_stages(site) or 0

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels from one place of each of the stages to the next, of a timm model in stages."""
        return tuple(info["reduction"] for info in self.module.feature_info)

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Width of the token stream of each stage, of a tower in stages."""
        return tuple(self.blocks[sum(self.stages[: index + 1]) - 1].width for index in range(len(self.stages)))

    def parameter_names(self) -> list[str]:
        """Names in `module` of the tower's own parameters."""
        excluded = ("peft.", *self.excluded)
        names = [name for name, _ in self.module.named_parameters() if not name.startswith(excluded)]
        return [name for name in names if name not in self.unreached]

    def all_layers(self) -> Iterator[tuple[int | None, Layer]]:
        """Every layer site with the index of its block, or None outside the blocks."""
        for layer in self.layers.values():
            yield None, layer
        for index, block in enumerate(self.blocks):
            for layer in block.layers.values():
                yield index, layer

    def layer(self, block: int | None, site: str) -> Layer:
        """The layer site of a block, or of the tower itself if `block` is None."""
        return self.layers[site] if block is None else self.blocks[block].layers[site]


@dataclass
class Backbone:
    """A model as methods and the mechanism see it.

    Args:
        library: "timm" or "open_clip".
        name: architecture name, as far as the model records it.
        model: the model itself.
        towers: its towers by name.
        heads: paths of the classification heads, empty if the model has none.
        refused: why a tower of the model is missing from `towers`, by its name.
        unused_heads: paths of classification heads that the model has, but does not call.
    """

    library: str
    name: str
    model: nn.Module
    towers: dict[str, Tower]
    heads: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    unused_heads: tuple[str, ...] = ()
