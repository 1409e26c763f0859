"""timm `HieraDet`, the image trunk of SAM 2: attention inside windows of a map, or over all of it, whose queries are
pooled in the first block of a stage.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.hieradet_sam2 import (
    HieraDet,
    MultiScaleAttention,
    MultiScaleBlock,
    window_partition,
    window_unpartition,
)

from visionpeft.backbones.attention import AttendsAfterNorm
from visionpeft.backbones.dispatch import describe_attention, describe_block, describe_model
from visionpeft.backbones.layer import Layer
from visionpeft.backbones.pooled_queries import attend_pooled, hiera_backbone, pooling_block, pooling_layers
from visionpeft.backbones.tower import Backbone, BlockSites
from visionpeft.backbones.windows import project_windows, window_heads
from visionpeft.sites import MapFlow, Sites


class SitedMultiScaleAttention(MultiScaleAttention):
    """timm `MultiScaleAttention` with sites q, k, v and kv. Prompts and prefixes are keys in every window.

    What acts at q acts before queries are pooled.
    """

    sites: Sites

    def forward(self, x: torch.Tensor, samples: int | None = None) -> torch.Tensor:
        """Attend inside windows (batch * windows, rows, columns, width), those of a sample one after another.

        Args:
            x: the windows.
            samples: the batch; by default each window is a sample of its own.
        """
        samples, (rows, columns) = samples or len(x), x.shape[1:3]
        x = x.flatten(1, 2)
        q, k, v = window_heads(self, x, self.sites, samples, self.qkv, self.qkv.bias)
        if self.q_pool is not None:
            q = self.q_pool(q.transpose(2, 3).flatten(1, 2).unflatten(2, (rows, columns)))
            rows, columns = q.shape[2:]
            q = q.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)
        k, v = self.sites.kv(k, v, x)
        x = project_windows(self, attend_pooled(self, q, k, v), self.sites, samples)
        return x.unflatten(1, (rows, columns))


class SitedMultiScaleBlock(MultiScaleBlock, AttendsAfterNorm):
    """timm `MultiScaleBlock` with sites: s + drop_path(ls1(windows(norm1 x))), then x + drop_path(ls2(mlp(norm2 x))).

    s is x, or where the width changes pool(proj(norm1 x)), which does not see what acts at attn_in. The pixels of the
    maps (batch, rows, columns, width) are the tokens; q, k, v, kv and proj are inside the windows, where the zeros by
    which a map is filled up take part.
    """

    sites: Sites

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map a map (batch, rows, columns, width) to one of the same or another size and width."""
        at = MapFlow(self.sites, x.shape[1:3])
        x = at("stream_in", x)
        normed = self.norm1(x)
        h = self.windows(at("attn_in", normed))
        if self.dim != self.dim_out:
            x = self.proj(normed)
            if self.pool is not None:
                x = self.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        at.grid = tuple(x.shape[1:3])
        h = at("attn_out", h[:, : at.grid[0], : at.grid[1]].contiguous())
        x = at("stream_mid", x + self.drop_path1(self.ls1(h)))
        shape = x.shape
        x = x.reshape(shape[0], -1, shape[-1])
        h = at("mlp_out", self.sites.mlp(lambda x: self.mlp(at("mlp_in", self.norm2(x))), x))
        return at("stream_out", x + self.drop_path2(self.ls2(h))).reshape(shape)

    def windows(self, h: torch.Tensor) -> torch.Tensor:
        """Attention inside the windows of h (batch, rows, columns, width), with the zeros by which h is filled up."""
        samples, rows, columns = h.shape[:3]
        if not self.is_windowed:
            return self.attn(h, samples=samples)
        window, pool = self.window_size, self.q_stride or (1, 1)
        h = F.pad(h, (0, 0, 0, -columns % window[1], 0, -rows % window[0]))
        rows, columns = h.shape[1] // pool[0], h.shape[2] // pool[1]
        h = self.attn(window_partition(h, window), samples=samples)
        return window_unpartition(h, (window[0] // pool[0], window[1] // pool[1]), (rows, columns))


@describe_attention.register
def _(attention: MultiScaleAttention) -> tuple[type[nn.Module], dict[str, Layer]]:
    return SitedMultiScaleAttention, pooling_layers(attention)


@describe_block.register
def _(block: MultiScaleBlock) -> BlockSites:
    # Rows that the windows do not divide, but the pooling of queries does.
    sides = [2 * side - 2 if side else 4 for side in block.window_size]

    def probe(num_tokens: int) -> dict:
        return {"x": torch.randn(2, *sides, block.dim, dtype=torch.float64)}

    described = pooling_block(block, SitedMultiScaleBlock, probe)
    described.fills_up = block.is_windowed
    return described


@describe_model.register
def _(model: HieraDet) -> Backbone:
    return hiera_backbone(model, [describe_block(block) for block in model.blocks])
