"""timm `Hiera`: attention inside mask units, then over all tokens, whose queries are pooled in the first block of a
stage.

Its tokens lie in the order in which pooling and mask units are parts of the tensor (timm's `Unroll`), not row by row.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
from timm.models.hiera import Hiera, HieraBlock, MaskUnitAttention, Unroll

from visionpeft.backbones.attention import AttendsAfterNorm
from visionpeft.backbones.dispatch import describe_attention, describe_block, describe_model
from visionpeft.backbones.layer import Layer
from visionpeft.backbones.pooled_queries import attend_pooled, hiera_backbone, pooling_block, pooling_layers
from visionpeft.backbones.tower import Backbone, BlockSites
from visionpeft.backbones.windows import project_windows, window_heads
from visionpeft.errors import UnsupportedError
from visionpeft.sites import MapFlow, Sites


@dataclass
class Unrolled:
    """Where unrolled tokens lie.

    Args:
        grid: rows and columns.
        raster: for each place, row by row, the index of the token that lies there.
    """

    grid: tuple[int, int]
    raster: torch.Tensor

    def __post_init__(self):
        self.places = self.raster.argsort()

    def rolled(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (batch, tokens, width) row by row.

        Raises:
            UnsupportedError: some are masked.
        """
        if x.shape[1] != len(self.raster):
            raise UnsupportedError(
                f"what acts on the grid needs all {len(self.raster)} tokens, but there are {x.shape[1]}; call the "
                "model without a mask, or with patch_drop_rate=0"
            )
        return x[:, self.raster.to(x.device)]

    def unrolled(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (batch, tokens, width) that are row by row in the order of the block."""
        return x[:, self.places.to(x.device)]


class UnrolledFlow(MapFlow):
    """One pass of unrolled tokens (batch, tokens, width) through one block; what reads the grid sees them row by row.

    Args:
        sites: those of the block.
        layout: where its tokens lie.
    """

    def __init__(self, sites: Sites, layout: Unrolled):
        super().__init__(sites, layout.grid)
        self.layout = layout

    def act(self, module, x: torch.Tensor) -> torch.Tensor:
        """Let a module act on tokens x (batch, tokens, width)."""
        if not getattr(module, "reads_grid", False):
            return module(x)
        return self.layout.unrolled(module(self.layout.rolled(x), self.layout.grid))


class SitedMaskUnitAttention(MaskUnitAttention):
    """timm `MaskUnitAttention` with sites q, k, v and kv. Prompts and prefixes are keys in every mask unit.

    What acts at q acts before queries are pooled.
    """

    sites: Sites

    @property
    def num_heads(self) -> int:
        """Number of heads."""
        return self.heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map unrolled tokens (batch, tokens, width) to (batch, tokens / q_stride, width)."""
        samples = len(x)
        units = x.shape[1] // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
        x = x.unflatten(1, (-1, units)).transpose(1, 2).flatten(0, 1)  # of which those of a unit are apart
        q, k, v = window_heads(self, x, self.sites, samples, self.qkv, self.qkv.bias)
        if self.q_stride > 1:
            q = q.unflatten(2, (self.q_stride, -1)).amax(dim=2)
        k, v = self.sites.kv(k, v, x)
        x = attend_pooled(self, *(part.contiguous() for part in (q, k, v)))  # as kernels want them
        x = project_windows(self, x, self.sites, samples)
        return x.unflatten(0, (samples, units)).transpose(1, 2).flatten(1, 2)


class SitedHieraBlock(HieraBlock, AttendsAfterNorm):
    """timm `HieraBlock` with sites: s + drop_path(ls1(attn(norm1 x))), then x + drop_path(ls2(mlp(norm2 x))).

    s is x, or where the width changes the largest of each group of tokens that are pooled, of proj(norm1 x), which does
    not see what acts at attn_in; or without proj, of x, beside their mean.
    """

    sites: Sites

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map unrolled tokens (batch, tokens, width) to as many or fewer, of the same or another width."""
        entering, leaving = self.sites.layout
        at = UnrolledFlow(self.sites, entering)
        x = at("stream_in", x)
        normed = self.norm1(x)
        h = self.attn(at("attn_in", normed))
        if self.do_expand:
            groups = (x if self.proj is None else self.proj(normed)).unflatten(1, (self.attn.q_stride, -1))
            x = groups.amax(dim=1)
            if self.proj is None:
                x = torch.cat((x, groups.mean(dim=1)), dim=-1)
        at.layout = leaving
        x = at("stream_mid", x + self.drop_path1(self.ls1(at("attn_out", h))))
        h = at("mlp_out", self.sites.mlp(lambda x: self.mlp(at("mlp_in", self.norm2(x))), x))
        return at("stream_out", x + self.drop_path2(self.ls2(h)))


@describe_attention.register
def _(attention: MaskUnitAttention) -> tuple[type[nn.Module], dict[str, Layer]]:
    return SitedMaskUnitAttention, pooling_layers(attention)


@describe_block.register
def _(block: HieraBlock) -> BlockSites:
    attention = block.attn
    tokens = 2 * attention.q_stride * attention.window_size  # of two mask units

    def probe(num_tokens: int) -> dict:
        return {"x": torch.randn(2, tokens, block.dim, dtype=torch.float64)}

    return pooling_block(block, SitedHieraBlock, probe)


@describe_model.register
def _(model: Hiera) -> Backbone:
    if len(model.patch_stride) != 2:
        raise UnsupportedError("a Hiera of clips has no sited blocks; those of images have")
    blocks = [describe_block(block) for block in model.blocks]
    layouts = _layouts(model)
    ends = model.stage_ends[: model.q_pool]
    for index, block in enumerate(blocks):
        before, after = (sum(end < each for end in ends) for each in (index - 1, index))
        block.layout = layouts[before], layouts[after]
    return hiera_backbone(model, blocks)


def _layouts(model: Hiera) -> list[Unrolled]:
    """Where tokens lie before queries are first pooled, and after each time."""
    size, schedule = tuple(model.unroll.size), list(model.unroll.schedule)
    layouts = []
    for _ in range(model.q_pool + 1):
        places = torch.arange(size[0] * size[1], device=model.patch_embed.proj.weight.device).view(1, -1, 1)
        layouts.append(Unrolled(size, Unroll(size, (1, 1), schedule)(places).flatten().argsort()))
        if schedule:
            size = tuple(side // stride for side, stride in zip(size, schedule.pop(0), strict=True))
    return layouts
