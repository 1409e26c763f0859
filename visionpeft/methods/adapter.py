"""Bottleneck adapters at the places the literature compares.

Houlsby et al., Parameter-Efficient Transfer Learning for NLP, 2019, https://arxiv.org/abs/1902.00751;
Pfeiffer et al., AdapterFusion, 2021, https://arxiv.org/abs/2005.00247;
Steitz and Roth, Adapters Strike Back (Adapter+), 2024, https://arxiv.org/abs/2406.06820.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from visionpeft.backbones.tower import Tower
from visionpeft.errors import UnsupportedError
from visionpeft.methods.parts.addressing import Blocks, Overrides
from visionpeft.methods.parts.base import Method, blocks_of, require
from visionpeft.methods.parts.bottleneck import ACTIVATIONS, INITS, Bottleneck
from visionpeft.sites import Placement

# placement -> sites as (reads at, adds at); a serial adapter acts where it reads.
PLACEMENTS = {
    "houlsby": (("attn_out", None), ("mlp_out", None)),
    "pfeiffer": (("mlp_out", None),),
    "parallel": (("stream_mid", "stream_out"),),
    "pre": (("stream_mid", None),),
    "adapter_plus": (("stream_out", None),),
}


# With `after_scaling`, as (starts at, ends at, name in the adapter): what the stream gains in between is the branch.
AFTER_SCALING = {
    "houlsby": (("stream_in", "stream_mid", "attn_out"), ("stream_mid", "stream_out", "mlp_out")),
    "pfeiffer": (("stream_mid", "stream_out", "mlp_out"),),
}


class AfterScaling(Bottleneck):
    """x + t + A(t), where t is what a branch of the block has added to its stream x: after layer scale and drop path.

    t is taken as the difference of the stream after and before it.
    """

    stackable = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The stream (batch, tokens, width) before the branch."""
        return x

    def join(self, after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Map the streams (batch, tokens, width) after and before the branch to what goes on."""
        return after + super().forward(after - before)


@dataclass(frozen=True)
class Adapter(Method):
    """Bottleneck adapters A(u) = scale * up(act(down u)) in every block, with y the stream after attention.

    houlsby: t + A(t) and m + A(m) on the outputs t of attention and m of the MLP, before layer scale and residual.
    pfeiffer: m + A(m) only (what ViT papers call so). parallel: A(y) added to the block's output. pre: y + A(y) before
    the MLP. adapter_plus: z + A(z) on the block's output, with a scale for each channel and drop path 0.1.
    houlsby and pfeiffer come from papers on language models, which have neither layer scale nor drop path. The code of
    Adapter+ acts after both, which is `after_scaling`; the default acts before both. Its houlsby also trains the
    LayerNorms: `vp.attach(model, Adapter(placement="houlsby"), train=["*norm*"])`, or `--model.train "[*norm*]"`.
    Not mergeable: it is not linear. The zero initialisation of both matrices found in published code never trains.
    Trainable on L blocks of width D and bottleneck h: L (2 D h + h + D) for one adapter per block, twice that for
    houlsby; L D more with a channel scale.
    Source: Houlsby et al., Parameter-Efficient Transfer Learning for NLP, 2019; Pfeiffer et al., AdapterFusion, 2021;
    Steitz and Roth, Adapters Strike Back, 2024.

    Args:
        bottleneck: width h.
        placement: one of houlsby, pfeiffer, parallel, pre, adapter_plus.
        activation: gelu, relu, silu or identity.
        scale: a fixed number, "learned" or "channel"; None for the placement's own (1, adapter_plus: "channel").
        dropout: dropout in the bottleneck.
        drop_path: probability of dropping A(u) for a sample; None for the placement's own (0, adapter_plus: 0.1).
        init: "houlsby" (near identity), "lora" (identity at the start) or "bert".
        after_scaling: for houlsby and pfeiffer, act after layer scale and drop path instead of before both.
        overrides: other bottlenecks for some blocks, such as {"last:4": 32}.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    bottleneck: int = 8
    placement: str = "pfeiffer"
    activation: str = "gelu"
    scale: float | str | None = None
    dropout: float = 0.0
    drop_path: float | None = None
    init: str = "houlsby"
    after_scaling: bool = False
    overrides: dict[str, int] = field(default_factory=dict)
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        widths = [self.bottleneck, *self.overrides.values()]
        require(all(h > 0 for h in widths), self, "bottleneck must be a positive integer")
        for field_name, allowed in (("placement", PLACEMENTS), ("activation", ACTIVATIONS), ("init", INITS)):
            value = getattr(self, field_name)
            require(value in allowed, self, f"{field_name} must be one of {', '.join(allowed)}, not {value!r}")
        for field_name, value in (("dropout", self.dropout), ("drop_path", self.drop_path or 0.0)):
            require(0 <= value < 1, self, f"{field_name} must be in [0, 1), not {value}")
        after = not self.after_scaling or self.placement in AFTER_SCALING
        require(after, self, f"after_scaling is for placement {' and '.join(AFTER_SCALING)}, not {self.placement!r}")
        learned = ("learned", "channel")
        require(not isinstance(self.scale, str) or self.scale in learned, self, f"scale must be a number or {learned}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One or two `Bottleneck` modules in every chosen block."""
        plus = self.placement == "adapter_plus"
        scale = self.scale if self.scale is not None else "channel" if plus else 1.0
        drop_path = self.drop_path if self.drop_path is not None else 0.1 if plus else 0.0
        widths = Overrides(self.bottleneck, self.overrides, tower, (), "Adapter overrides")
        for index in blocks_of(self, tower):
            if self.after_scaling and tower.blocks[index].beside:
                raise UnsupportedError(
                    f"Adapter: after_scaling reads what one branch has added to the stream, but in blocks of class "
                    f"{type(tower.blocks[index].module).__name__} attention and MLP are scaled and added together; use "
                    "after_scaling=False"
                )
            places = AFTER_SCALING if self.after_scaling else PLACEMENTS
            for site, add, *name in places[self.placement]:
                module = (AfterScaling if self.after_scaling else Bottleneck)(
                    width=tower.blocks[index].width,
                    bottleneck=widths.at(index),
                    activation=self.activation,
                    scale=scale,
                    dropout=self.dropout,
                    drop_path=drop_path,
                    init=self.init,
                    serial=add is None,
                )
                yield Placement(tower.name, index, site, module, add, *name)
