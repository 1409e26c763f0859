"""timm `VisionTransformerSAM`, the image encoder of SAM: a ViT on a map, with windows in all blocks but a few."""

import torch
import torch.nn as nn
from timm.models.vision_transformer_sam import (
    Attention,
    Block,
    VisionTransformerSAM,
    get_decomposed_rel_pos_bias,
    window_partition,
    window_unpartition,
)

from visionpeft.backbones.attention import AttendsAfterNorm, attend_as, qkv_layers
from visionpeft.backbones.dispatch import (
    describe_attention,
    describe_block,
    describe_model,
    norm_layers,
    pre_norm_block,
)
from visionpeft.backbones.layer import Layer
from visionpeft.backbones.timm_eva import rotated
from visionpeft.backbones.timm_vit import backbone_with_fc
from visionpeft.backbones.tower import Backbone, BlockSites, Tower
from visionpeft.backbones.windows import project_windows, window_heads
from visionpeft.sites import UNTOUCHED, MapFlow, Sites, is_drawn


class SitedSAMAttention(Attention):
    """timm SAM's `Attention` with sites q, k, v and kv. Prompts and prefixes are keys in every window, with a relative
    position bias of zero, and not rotated.
    """

    sites: Sites

    def forward(self, x: torch.Tensor, samples: int | None = None) -> torch.Tensor:
        """Attend inside windows (batch * windows, rows, columns, width), those of a sample one after another.

        Args:
            x: the windows.
            samples: the batch; by default each window is a sample of its own.
        """
        size, x = x.shape[1:3], x.flatten(1, 2)
        samples, pixels = samples or len(x), x.shape[1]
        q, k, v = window_heads(self, x, self.sites, samples, self.qkv, self.qkv.bias)
        q, k, bias = self.sites.call(self.q_norm, q), self.sites.call(self.k_norm, k), None
        if self.use_rel_pos:
            bias = get_decomposed_rel_pos_bias(q.flatten(0, 1), self.rel_pos_h, self.rel_pos_w, size, size)
            bias = bias.unflatten(0, (-1, self.num_heads))
        elif self.rope is not None:
            rope = self.rope.get_embed()
            q, k = (rotated(part, rope, pixels, False).type_as(v) for part in (q, k))
        k, v = self.sites.kv(k, v, x)
        x = attend_as(self, q, k, v, attn_mask=bias, fused=self.fused_attn)
        return self.proj_drop(project_windows(self, x, self.sites, samples)).unflatten(1, size)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over tokens (batch, tokens, width) without positions and without what acts at the sites."""
        q, k, v = window_heads(self, x, UNTOUCHED, len(x), self.qkv, self.qkv.bias)
        x = attend_as(self, UNTOUCHED.call(self.q_norm, q), UNTOUCHED.call(self.k_norm, k), v, fused=self.fused_attn)
        return self.proj_drop(project_windows(self, x, UNTOUCHED, len(x)))


class SitedSAMBlock(Block, AttendsAfterNorm):
    """timm SAM's `Block` with sites: x + drop_path(ls1(windows(norm1 x))), then x + drop_path(ls2(mlp(norm2 x))).

    The pixels of the maps (batch, rows, columns, width) are the tokens; q, k, v, kv and proj are inside the windows,
    where the zeros by which a map is filled up take part. The first drop path drops windows, as in the library.
    """

    sites: Sites

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map a map (batch, rows, columns, width) to the same shape."""
        shape = x.shape
        at = MapFlow(self.sites, shape[1:3])
        x = at("stream_in", x)
        h = self.ls1(at("attn_out", self.windows(at("attn_in", self.norm1(x)), self.attn, samples=shape[0])))
        if is_drawn(self.drop_path1):
            h = self.windows(h, self.drop_path1)
        x = at("stream_mid", x + h).reshape(shape[0], -1, shape[-1])
        h = at("mlp_out", self.sites.mlp(lambda x: self.mlp(at("mlp_in", self.norm2(x))), x))
        return at("stream_out", x + self.drop_path2(self.ls2(h))).reshape(shape)

    def windows(self, h: torch.Tensor, part: nn.Module, **options) -> torch.Tensor:
        """What a part makes of h (batch, rows, columns, width), window by window."""
        if self.window_size == 0:
            return part(h, **options)
        windows, filled = window_partition(h, self.window_size)
        return window_unpartition(part(windows, **options), self.window_size, h.shape[1:3], filled)


@describe_attention.register
def _(attention: Attention) -> tuple[type[nn.Module], dict[str, Layer]]:
    layers = qkv_layers(attention.qkv)
    layers["k"].shift_is_void = attention.rope is None and isinstance(attention.k_norm, nn.Identity)
    layers |= norm_layers(q_norm=attention.q_norm, k_norm=attention.k_norm)
    return SitedSAMAttention, layers | {"proj": Layer("proj", "linear", attention.proj)}


@describe_block.register
def _(block: Block) -> BlockSites:
    attention, side = block.attn, block.window_size

    def probe(num_tokens: int) -> dict:
        size = (2 * side - 1, side) if side else (4, 3)
        if not side and attention.rope is not None:
            size = attention.rope.feat_shape
        return {"x": torch.randn(2, *size, block.attn.proj.out_features, dtype=torch.float64)}

    described = pre_norm_block(block, SitedSAMBlock, probe)
    described.on_map, described.knows_positions, described.fills_up = True, True, side > 0
    return described


@describe_model.register
def _(model: VisionTransformerSAM) -> Backbone:
    layers = {"patch_embed": Layer("patch_embed", "conv", model.patch_embed.proj)}
    layers |= norm_layers(patch_embed_norm=model.norm_pre)
    final = {}
    for index, part in enumerate(model.neck if isinstance(model.neck, nn.Sequential) else [model.neck]):
        if isinstance(part, nn.Conv2d):
            layers[f"neck_{index}"] = Layer(f"neck_{index}", "conv", part)
        else:
            final |= norm_layers(**{f"neck_norm_{index}": part})
    final |= norm_layers(norm=getattr(model.head, "norm", None))
    for layer in final.values():
        layer.channels_first = True
    tower = Tower(
        name="visual",
        path="",
        module=model,
        blocks=[describe_block(block) for block in model.blocks],
        common_width=model.embed_dim,
        num_prefix_tokens=0,
        layers=layers | final,
        patch_size=tuple(model.patch_embed.patch_size),
        spanning=(model,),
        final_norms=tuple(final),
        excluded=("head.fc.",),
    )
    return backbone_with_fc(model, tower)
