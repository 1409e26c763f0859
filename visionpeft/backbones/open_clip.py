"""OpenCLIP models: native visual and text towers on both attention classes, and towers with a timm trunk."""

from collections.abc import Callable

import torch
import torch.nn as nn
from open_clip import CLIP, CoCa, CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import (
    Attention,
    CustomResidualAttentionBlock,
    LayerNormFp32,
    ResidualAttentionBlock,
    TextTransformer,
    VisionTransformer,
)

from visionpeft.backbones.attention import attend, attend_as, fused_qkv, fused_qkv_layers, thirds
from visionpeft.backbones.dispatch import describe_attention, describe_block, describe_model, norm_layers
from visionpeft.backbones.layer import Layer
from visionpeft.backbones.layers_only import describe_part, layers_only
from visionpeft.backbones.tower import Backbone, BlockSites, Tower
from visionpeft.errors import UnsupportedError
from visionpeft.sites import UNTOUCHED, Sites

# What the layers of a ResNet's attention pool are called elsewhere.
POOL = {f"attnpool.{name}_proj": site for name, site in {"q": "q", "k": "k", "v": "v", "c": "proj"}.items()}


def project(
    attention: nn.MultiheadAttention | Attention, x: torch.Tensor, sites: Sites | None = None
) -> tuple[torch.Tensor, ...]:
    """q (batch, heads, tokens that ask, d) and k, v (batch, heads, keys, d) of tokens x (batch, tokens, width).

    What acts at q, k and v has acted. The sites are those of the attention, if it has any, or the given ones.
    """
    sites = sites_of(attention) if sites is None else sites
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    parts = fused_qkv(sites, x, None, weight, bias)
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in parts)
    if isinstance(attention, Attention):
        q, k = sites.call(attention.ln_q, q), sites.call(attention.ln_k, k)
    return q, k, v


def join_heads(
    attention: nn.MultiheadAttention | Attention, x: torch.Tensor, sites: Sites | None = None
) -> torch.Tensor:
    """Output (batch, tokens, width) of an attention from its attended values x (batch, heads, tokens, head width)."""
    sites = sites_of(attention) if sites is None else sites
    if not isinstance(attention, Attention):
        return sites.call(attention.out_proj, x.transpose(1, 2).flatten(2))
    if attention.head_scale is not None:
        x = x * attention.head_scale
    x = sites.call(attention.ln_inner, x.transpose(1, 2).flatten(2))
    return attention.out_drop(sites.call(attention.out_proj, x))


def sites_of(attention: nn.MultiheadAttention | Attention) -> Sites:
    """The sites of an attention; none act in one that has no adapters."""
    return getattr(attention, "sites", UNTOUCHED)


class SitedMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` as OpenCLIP's blocks call it (self-attention, batch first), with sites q, k, v and kv.

    Unlike torch's, it calls `out_proj` as a module, so that what acts at `proj` is reached.
    """

    sites: Sites

    def forward(self, query, key, value, need_weights=False, attn_mask=None, **others):
        """Attend over tokens (batch, tokens, width); returns (output, None)."""
        if need_weights or others or query is not key or key is not value:
            raise UnsupportedError("attention with an adapter attached computes self-attention without weights only")
        q, k, v = project(self, query)
        k, v = self.sites.kv(k, v, query)
        mask = by_head(attn_mask, query.shape[0], self.num_heads)
        x = attend(q, k, v, attn_mask=mask, dropout=self.dropout if self.training else 0.0)
        return join_heads(self, x), None

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over tokens (batch, tokens, width) without a mask and without what acts at the sites."""
        x = attend(*project(self, x, UNTOUCHED), dropout=self.dropout if self.training else 0.0)
        return join_heads(self, x, UNTOUCHED)


class SitedCustomAttention(Attention):
    """OpenCLIP's own `Attention` (packed in_proj, optional q/k norm, head scale, inner norm) with sites."""

    sites: Sites

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attend over tokens (batch, tokens, width)."""
        q, k, v = project(self, x)
        k, v = self.sites.kv(k, v, x)
        mask = by_head(attn_mask, x.shape[0], self.num_heads)
        return join_heads(self, attend_as(self, q, k, v, attn_mask=mask, fused=self.use_fsdpa))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over tokens (batch, tokens, width) without a mask and without what acts at the sites."""
        x = attend_as(self, *project(self, x, UNTOUCHED), fused=self.use_fsdpa)
        return join_heads(self, x, UNTOUCHED)


def by_head(mask: torch.Tensor | None, batch: int, heads: int) -> torch.Tensor | None:
    """A mask (N, N), or (batch * heads, N, N) as (batch, heads, N, N)."""
    return mask.reshape(batch, heads, *mask.shape[1:]) if mask is not None and mask.ndim == 3 else mask


def additive(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """OpenCLIP's masks as additive ones of the tokens' dtype; a boolean one there is True where masked."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
    return None if mask is None else mask.to(like.dtype)


def residual_block(
    block: ResidualAttentionBlock | CustomResidualAttentionBlock,
    x: torch.Tensor,
    at: Callable[[str, torch.Tensor], torch.Tensor],
    attention: Callable[[torch.Tensor], torch.Tensor],
    kept: torch.Tensor | slice | None = None,
    call: Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], torch.Tensor] = lambda branch, x: branch(x),
) -> torch.Tensor:
    """x + ls_1(attention(ln_1 x)), then x + ls_2(mlp(ln_2 x)), with sites.

    Args:
        block: the block, whose attention is not called.
        x: tokens (batch, tokens, width).
        at: what acts at a token site.
        attention: the attention branch; in OpenCLIP's custom block `attn_out` is after the norm of this branch.
        kept: the tokens that go on after the attention, if not all; `attention` returns only those.
        call: calls the MLP branch.
    """
    x = at("stream_in", x)
    h = attention(at("attn_in", block.ln_1(x)))
    if isinstance(block, CustomResidualAttentionBlock):
        h = block.ln_attn(h)
    x = x if kept is None else x[:, kept]
    x = at("stream_mid", x + block.ls_1(at("attn_out", h)))
    h = at("mlp_out", call(lambda x: block.mlp(at("mlp_in", block.ln_2(x))), x))
    return at("stream_out", x + block.ls_2(h))


class SitedResidualAttentionBlock(ResidualAttentionBlock):
    """OpenCLIP `ResidualAttentionBlock` with sites."""

    sites: Sites

    def forward(self, q_x, k_x=None, v_x=None, attn_mask=None):
        """Map tokens (batch, tokens, width) to the same shape."""
        if k_x is not None or v_x is not None:
            raise UnsupportedError("cross-attention blocks have no sited form")
        sites, mask = self.sites, self.sites.mask(additive(attn_mask, q_x))
        return residual_block(
            self, q_x, sites.enter(), lambda h: self.attention(h, attn_mask=mask), sites.kept, sites.mlp
        )

    def attention_input(self, x: torch.Tensor, sites: Sites = UNTOUCHED) -> torch.Tensor:
        """What the attention reads of the stream x (batch, tokens, width), with what acts at these sites."""
        return sites.call(self.ln_1, x)

    def attend(self, h: torch.Tensor) -> torch.Tensor:
        """The attention branch of h (batch, tokens, width) up to `attn_out`, without mask and what acts in it."""
        return self.attn.attend(h)


class SitedCustomResidualAttentionBlock(CustomResidualAttentionBlock):
    """OpenCLIP `CustomResidualAttentionBlock` with sites."""

    sites: Sites

    def forward(self, x: torch.Tensor, k_x=None, v_x=None, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape; gradient checkpointing passes four arguments."""
        sites, mask = self.sites, self.sites.mask(additive(attn_mask, x))
        return residual_block(self, x, sites.enter(), lambda h: self.attn(h, attn_mask=mask), sites.kept, sites.mlp)

    def attention_input(self, x: torch.Tensor, sites: Sites = UNTOUCHED) -> torch.Tensor:
        """What the attention reads of the stream x (batch, tokens, width), with what acts at these sites."""
        return sites.call(self.ln_1, x)

    def attend(self, h: torch.Tensor) -> torch.Tensor:
        """The attention branch of h (batch, tokens, width) up to `attn_out`, without mask and what acts in it."""
        return UNTOUCHED.call(self.ln_attn, self.attn.attend(h))


@describe_attention.register(nn.MultiheadAttention)
@describe_attention.register(Attention)
def _(attention: nn.MultiheadAttention | Attention) -> tuple[type[nn.Module], dict[str, Layer]]:
    if getattr(attention, "scaled_cosine", False):
        raise UnsupportedError("OpenCLIP's scaled cosine attention is refused: open_clip's own forward of it fails")
    if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first:
        raise UnsupportedError("OpenCLIP towers with batch_first=False have no sited form")
    bias = {}
    if attention.in_proj_bias is not None:
        rows = thirds(attention.in_proj_weight.shape[1])
        bias = {site: (attention, "in_proj_bias", rows[site]) for site in rows}
    layers = fused_qkv_layers(attention, "in_proj_weight", bias)
    layers |= norm_layers(
        q_norm=getattr(attention, "ln_q", None),
        k_norm=getattr(attention, "ln_k", None),
        attn_norm=getattr(attention, "ln_inner", None),
    )
    layers["proj"] = Layer("proj", "linear", attention.out_proj)
    return (SitedCustomAttention if isinstance(attention, Attention) else SitedMultiheadAttention), layers


@describe_block.register(ResidualAttentionBlock)
@describe_block.register(CustomResidualAttentionBlock)
def _(block: ResidualAttentionBlock | CustomResidualAttentionBlock) -> BlockSites:
    custom = isinstance(block, CustomResidualAttentionBlock)
    sited_class = SitedCustomResidualAttentionBlock if custom else SitedResidualAttentionBlock
    sited_attention_class, layers = describe_attention(block.attn)
    layers = norm_layers(norm1=block.ln_1) | layers | norm_layers(attn_branch_norm=getattr(block, "ln_attn", None))
    layers |= norm_layers(norm2=block.ln_2) | {"fc1": Layer("fc1", "linear", block.mlp.c_fc)}
    layers |= norm_layers(mlp_norm=getattr(block.mlp, "ln", None)) | {"fc2": Layer("fc2", "linear", block.mlp.c_proj)}

    def probe(num_tokens: int) -> dict:
        return {"attn_mask": torch.full((num_tokens, num_tokens), float("-inf")).double().triu_(1)}

    # the norms of a tower built with precision="fp16" or "bf16"
    norms = tuple(part for part in block.modules() if isinstance(part, LayerNormFp32))
    return BlockSites(
        block, sited_class, block.attn, sited_attention_class, layers, probe, block.mlp.gelu, only_in_float32=norms
    )


def visual_tower(tower: VisionTransformer, path: str) -> Tower:
    """Describe OpenCLIP's own image tower. Prompts sit after the class token, after `ln_pre`."""
    sink = (tower, "positional_embedding", (slice(1, None),))
    layers = {"patch_embed": Layer("patch_embed", "conv", tower.conv1, shift_sink=sink)}
    return Tower(
        name="visual",
        path=path,
        module=tower,
        blocks=[describe_block(block) for block in tower.transformer.resblocks],
        common_width=tower.conv1.out_channels,
        num_prefix_tokens=1,
        layers=layers | norm_layers(norm_pre=tower.ln_pre, norm=tower.ln_post),
        pools_class_token=tower.pool_type == "tok" and tower.attn_pool is None and not tower.output_tokens,
        patch_size=tuple(tower.patch_size),
        spanning=(tower, tower.transformer),
        grid_size=tuple(tower.grid_size),
    )


def text_tower(tower: nn.Module, path: str) -> Tower:
    """Describe OpenCLIP's own text tower, which a plain `CLIP` keeps unpacked on itself."""
    causal = tower.attn_mask is not None
    return Tower(
        name="text",
        path=path,
        module=tower,
        blocks=[describe_block(block) for block in tower.transformer.resblocks],
        common_width=tower.token_embedding.embedding_dim,
        num_prefix_tokens=1,  # the start token
        layers=norm_layers(norm=tower.ln_final),
        causal=causal,
        spanning=(tower.transformer,),
        excluded=("visual.", "text_decoder.", "logit_"),
    )


@describe_model.register
def _(model: VisionTransformer) -> Backbone:
    return Backbone("open_clip", "VisionTransformer", model, {"visual": visual_tower(model, "")})


@describe_model.register
def _(model: TextTransformer) -> Backbone:
    return Backbone("open_clip", "TextTransformer", model, {"text": text_tower(model, "")})


@describe_model.register
def _(model: TimmModel) -> Backbone:
    trunk = describe_part(model.trunk)
    tower = trunk.towers["visual"]
    tower.path = "trunk"
    return Backbone("open_clip", trunk.name, model, {"visual": tower})


@describe_model.register
def _(model: ModifiedResNet) -> Backbone:
    """Layer sites: blocks are the bottlenecks, and last the attention pool, whose weights are read without a call."""
    stages = [f"layer{stage}" for stage in range(1, 5)]
    paths = [f"{stage}.{index}" for stage in stages for index in range(len(model.get_submodule(stage)))]
    reason = "ModifiedResNet has no sited blocks"
    backbone = layers_only(model, reason, (*paths, "attnpool"), POOL)
    (tower,) = backbone.towers.values()
    for block in tower.blocks:
        block.width = model.attnpool.q_proj.in_features
    tower.layer(len(paths), "k").shift_is_void = True  # a shift of all keys adds the same to all scores of a query
    return Backbone("open_clip", "ModifiedResNet", model, {"visual": tower})


@describe_model.register(CLIP)
@describe_model.register(CustomTextCLIP)
@describe_model.register(CoCa)
def _(model: CLIP | CustomTextCLIP | CoCa) -> Backbone:
    towers, refused = {}, {}
    try:
        tower = describe_model(model.visual).towers["visual"]
        tower.path = f"visual.{tower.path}".rstrip(".")
        towers["visual"] = tower
    except UnsupportedError as error:
        refused["visual"] = str(error)
    text = model.text if hasattr(model, "text") else model
    if isinstance(text, TextTransformer | CLIP):
        towers["text"] = text_tower(text, "text" if text is not model else "")
    else:
        refused["text"] = f"a text tower of class {type(text).__name__} has no sited blocks"
    return Backbone("open_clip", type(model).__name__, model, towers, refused=refused)
