"""SCT: A Simple Baseline for Parameter-Efficient Fine-Tuning via Salient Channels (Zhao et al., 2023).

https://arxiv.org/abs/2309.08513
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require, to_parameter_dtype
from visionpeft.methods.parts.measures import Measures, Place
from visionpeft.sites import TOKEN_SITES, Order, Placement

# position -> the sites where it acts
SITES = {"stream_mid": ("stream_mid",), "mlp_out": ("fc2",), "qv": ("q", "v")}


class SalientChannels(nn.Module):
    """u_S + W u_S + b in the place of some channels u_S of tokens u; all others stay as they are, bit by bit.

    W (K, K) is normal with standard deviation 0.02, b (K,) zero; the indices of the channels (K,) are a buffer.
    """

    tokenwise = True

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(channels, channels), std=0.02))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("channels", torch.arange(channels, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (..., width) to the same shape."""
        chosen = to_parameter_dtype(x.index_select(-1, self.channels), self.weight)
        return x.index_add(-1, self.channels, F.linear(chosen, self.weight, self.bias).to(x.dtype))


class SalientOutputs(SalientChannels):
    """`SalientChannels` on the output of a layer W0: another layer, (I + E W E^T) W0 with the columns E of I in S."""

    order = Order.OUTPUT

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map the layer's output y (..., out) to the same shape."""
        return super().forward(y)

    def merge(self, weight: torch.Tensor, bias: torch.Tensor | None):
        """Weight and bias that compute the same."""
        own, shift, channels = self.weight.to(weight), self.bias.to(weight), self.channels
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        return (
            weight.index_add(0, channels, own @ weight.index_select(0, channels)),
            bias.index_add(0, channels, own @ bias.index_select(0, channels) + shift),
        )


@dataclass(frozen=True)
class SCT(Method):
    """Maps the K channels that are largest on the task by a trained matrix, u_S + W u_S + b, and leaves the others.

    In every block by itself: `visionpeft.allocate` shows the frozen model training images before training (the
    command line does it by itself); a channel's score is the mean over classes of its L2 norm over the patches of all
    images of a class, tokens before the patches left out, and the K channels with the largest score are S. W is normal
    with standard deviation 0.02 and b zero, so that the start is near the backbone, not equal to it. Acts after the
    residual of the attention (`position="stream_mid"`, the paper's default), after the MLP, or on queries and values,
    each with channels of its own. Mergeable but for "stream_mid", which acts on the residual stream: into fc2, or into
    the rows of q and v. Of a text tower, all tokens after the start token count as patches; where the labels of the
    batches are no classes, all images are of one class. The published code writes tensors in place, has a scale that
    nothing reads, and reports the best epoch on the test set.
    Trainable: L (K^2 + K); 111,744 on ViT-B/16 for K = 96, and twice as many on queries and values.
    Source: Zhao et al., SCT: A Simple Baseline for Parameter-Efficient Fine-Tuning via Salient Channels, 2023, and the
    authors' code (showlab/SCT).

    Args:
        channels: number K of channels in S.
        position: "stream_mid", "mlp_out" or "qv".
        samples: how many samples are measured; None for all.
        measured: whether the channels have been chosen; found by `allocate`, not to be given.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    found: ClassVar[tuple[str, ...]] = ("measured",)

    channels: int = 96
    position: Literal["stream_mid", "mlp_out", "qv"] = "stream_mid"
    samples: int | None = None
    measured: bool = False
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.channels > 0, self, "channels must be a positive integer")
        require(self.samples is None or self.samples > 0, self, "samples must be a positive integer, or None for all")

    @property
    def pending(self) -> bool:
        """Whether the sizes of the channels have not been measured."""
        return not self.measured

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One or two modules in every chosen block."""
        for place in self._places(tower):
            module = SalientChannels if place.site in TOKEN_SITES else SalientOutputs
            yield Placement(tower.name, place.block, place.site, module(self.channels))

    def allocate(self, towers: Sequence[Tower], measures: Measures) -> tuple[Method, dict[str, torch.Tensor]]:
        """Choose the largest channels of every place."""
        places = [place for tower in towers for place in self._places(tower)]
        tensors = {}
        for place, sizes in measures.sizes(places, self.samples).items():
            width = sizes.shape[1]
            require(self.channels <= width, self, f"{place.path} has {width} channels, not {self.channels}")
            tensors[f"{place.path}.channels"] = sizes.mean(0).topk(self.channels).indices.sort().values.to(torch.int32)
        return dataclasses.replace(self, measured=True), tensors

    def combine(self, methods, parts, weights):
        """The weighted mean of W and b, of adapters that chose the same channels."""
        same = all(
            torch.equal(tensor, part[name])
            for name, tensor in parts[0].items()
            for part in parts
            if name.endswith(".channels")
        )
        require(same, self, "adapters that act on other channels cannot be combined")
        return super().combine(methods, parts, weights)

    def _places(self, tower: Tower) -> list[Place]:
        sites = SITES[self.position]
        return [Place(tower.name, index, site) for index in blocks_of(self, tower) for site in sites]
