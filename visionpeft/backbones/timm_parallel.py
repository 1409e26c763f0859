"""timm's ViT blocks with branches in parallel: attention beside the MLP (ViT-22B), also with differential attention,
and several attentions beside each other, then several MLPs.
"""

import torch
import torch.nn as nn
from timm.layers import Attention
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, ParallelThingsBlock

from visionpeft.backbones.attention import apply_rows, attend_as, fused_qkv, product_at
from visionpeft.backbones.differential import attend_twice, paired_heads
from visionpeft.backbones.dispatch import (
    describe_attention,
    describe_block,
    describe_mlp,
    norm_layers,
    require_own_class,
)
from visionpeft.backbones.layer import Layer
from visionpeft.backbones.timm_layers import plain_attention
from visionpeft.backbones.tower import BlockSites
from visionpeft.sites import UNTOUCHED, Sites
from visionpeft.sites.asking import ONLY_KEYS


class AttendsBesideMLP:
    """Mixed into the sited form of a block whose attention and MLP read one norm of the stream by one layer, `in_proj`.

    The MLP sees nothing of what attention adds to the stream, nor of what acts on it at stream_mid. Where it may read
    other tokens than the attention does, or prompts are keys, the rows of `in_proj` are multiplied apart, without a
    call of it.
    """

    def parallel(self, x: torch.Tensor, attn_mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        sites = self.sites
        at = sites.enter()
        entered = at("stream_in", x)
        normed = self.in_norm(entered)
        h = at("attn_in", normed)
        mask, hidden = sites.mask(attn_mask, is_causal), None
        apart = sites.kept is not None or sites.recompute_mlp or sites.key_prompts is not None
        if apart or sites.acted_on("attn_in", "mlp_in"):
            qkv = self.attention_rows(h, sites)
        else:
            layer, added = self.in_proj, {} if self.mlp_bias is None else {"fc1": self.mlp_bias}
            hidden, *qkv = apply_rows(sites, h, layer, layer.weight, layer.bias, rows_of(self), added)
        attended = self.attended(qkv, h, sites, mask, is_causal)
        if self.out_proj is None:
            y = at("attn_out", self.attn_out_proj(attended))
        x = at("stream_mid", sites.followed(entered))

        def activated(x: torch.Tensor) -> torch.Tensor:
            """What the last layer reads of the MLP's values in the stream x that has entered."""
            read = at("mlp_in", sites.followed(self.in_norm(x) if sites.recompute_mlp else normed))
            return self.mlp_drop(self.mlp_act(self.mlp_rows(read) if hidden is None else hidden))

        if self.out_proj is None:
            y = y + at("mlp_out", sites.mlp(lambda x: self.mlp_out_proj(activated(x)), entered))
        else:
            y = self.out_proj(torch.cat((attended, sites.mlp(activated, entered)), dim=-1))
        return at("stream_out", x + self.drop_path(self.ls(y)))

    def attended(
        self, qkv, h: torch.Tensor, sites: Sites, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """What attention makes (batch, tokens that ask, width) of q, k, v (batch, tokens, width), made from h."""
        q, k, v = self.heads(qkv, sites)
        k, v = sites.kv(k, v, h, lambda h: self.heads(self.attention_rows(h, ONLY_KEYS), ONLY_KEYS)[1:])
        return self.attend_heads(q, k, v, sites, attn_mask, is_causal)

    def attention_rows(self, h: torch.Tensor, sites: Sites) -> tuple[torch.Tensor, ...]:
        """q, k, v (batch, tokens, width) of tokens h, with what acts at these sites."""
        first, bias = self.in_split[0], self.in_proj.bias
        return fused_qkv(sites, h, None, self.in_proj.weight[first:], None if bias is None else bias[first:])

    def mlp_rows(self, h: torch.Tensor) -> torch.Tensor:
        """The MLP's values (batch, tokens, hidden) of tokens h, before the activation, with what acts at fc1."""
        first, bias = self.in_split[0], self.in_proj.bias
        own_bias = self.mlp_bias if bias is None else bias[:first]
        return product_at(self.sites, "fc1", h, self.in_proj.weight[:first], own_bias)

    def attention_input(self, x: torch.Tensor, sites: Sites = UNTOUCHED) -> torch.Tensor:
        """What the attention reads of the stream x (batch, tokens, width), with what acts at these sites."""
        return sites.call(self.in_norm, x)

    def attend(self, h: torch.Tensor) -> torch.Tensor:
        """The attention branch of h (batch, tokens, width) up to `attn_out`, without what acts at the sites."""
        return UNTOUCHED.call(self.attn_out_proj, self.attended(self.attention_rows(h, UNTOUCHED), h, UNTOUCHED))


def rows_of(block: nn.Module) -> dict[str, slice]:
    """The rows of `in_proj` that each site has."""
    rows, start = {}, 0
    for site, width in zip(("fc1", "q", "k", "v"), block.in_split, strict=True):
        rows[site] = slice(start, start + width)
        start += width
    return rows


class SitedParallelScalingBlock(ParallelScalingBlock, AttendsBesideMLP):
    """timm `ParallelScalingBlock` with sites: x + drop_path(ls(attention(norm x) + mlp(norm x)))."""

    sites: Sites

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        return self.parallel(x, attn_mask, is_causal)

    def heads(self, qkv: tuple[torch.Tensor, ...], sites: Sites) -> tuple[torch.Tensor, ...]:
        """q, k, v (batch, heads, tokens, head width) of parts (batch, tokens, width)."""
        q, k, v = (part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in qkv)
        return sites.call(self.q_norm, q), sites.call(self.k_norm, k), v

    def attend_heads(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sites: Sites,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
    ) -> torch.Tensor:
        """softmax(q k^T / sqrt(d)) v, as (batch, tokens that ask, width)."""
        x = attend_as(self, q, k, v, attn_mask=attn_mask, is_causal=is_causal, fused=self.fused_attn)
        return x.transpose(1, 2).flatten(2)


class SitedDiffParallelScalingBlock(DiffParallelScalingBlock, AttendsBesideMLP):
    """timm `DiffParallelScalingBlock` with sites: the same with differential attention."""

    sites: Sites

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        return self.parallel(x, attn_mask, is_causal)

    def heads(self, qkv: tuple[torch.Tensor, ...], sites: Sites) -> tuple[torch.Tensor, ...]:
        """q, k, v (batch, heads, tokens, 2 d) of parts (batch, tokens, width)."""
        return paired_heads(self, qkv, sites)

    def attend_heads(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sites: Sites,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
    ) -> torch.Tensor:
        """The difference of two attentions, as (batch, tokens that ask, width)."""
        return attend_twice(self, q, k, v, sites, attn_mask, is_causal)


@describe_block.register(ParallelScalingBlock)
@describe_block.register(DiffParallelScalingBlock)
def _(block: ParallelScalingBlock | DiffParallelScalingBlock) -> BlockSites:
    differential = isinstance(block, DiffParallelScalingBlock)
    sited_class = SitedDiffParallelScalingBlock if differential else SitedParallelScalingBlock
    require_own_class(block, sited_class)
    rows, owner = rows_of(block), block.in_proj
    has_bias = owner.bias is not None
    layers = norm_layers(norm1=block.in_norm)
    for site, own in rows.items():
        bias = {"bias_owner": owner, "bias_rows": own} if has_bias else {}
        if site == "fc1" and not has_bias:
            bias = {"bias_owner": block, "bias": "mlp_bias"}
        layers[site] = Layer(site, "linear", owner, rows=own, called=False, **bias)
    layers |= norm_layers(q_norm=block.q_norm, k_norm=block.k_norm)
    token_sites = BlockSites.token_sites
    if differential:
        layers |= norm_layers(sub_norm=block.sub_norm)
    if block.out_proj is None:
        layers["proj"] = Layer("proj", "linear", block.attn_out_proj)
        layers["fc2"] = Layer("fc2", "linear", block.mlp_out_proj)
    else:
        # One layer for both branches, which are nowhere by themselves after it.
        layers["proj"] = Layer("proj", "linear", block.out_proj, groups=("fc2",))
        token_sites = tuple(site for site in token_sites if site not in ("attn_out", "mlp_out"))
    return BlockSites(
        block,
        sited_class,
        block,
        sited_class,
        layers,
        activation=block.mlp_act,
        token_sites=token_sites,
        beside=True,
    )


class Numbered(Sites):
    """The sites of one of several attentions of a block, of which those of the first are called q_1, k_1 and v_1.

    Args:
        sites: those of the block.
        number: of the attention, from 1.
    """

    def __init__(self, sites: Sites, number: int):
        super().__init__(sites.num_prefix_tokens, sites.causal)
        self.class_token_only = sites.class_token_only
        names = {site: f"{site}_{number}" for site in "qkv"}
        self.acting = {site: sites.acting[name] for site, name in names.items() if name in sites.acting}


class SitedNumberedAttention(Attention):
    """timm `Attention` as one of several in a block, with sites of its own for q, k and v."""

    sites: Sites

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        number: int = 1,
    ) -> torch.Tensor:
        """Attend over tokens (batch, tokens, width), as that of a number."""
        return plain_attention(self, x, Numbered(self.sites, number), attn_mask, is_causal)


class SitedParallelThingsBlock(ParallelThingsBlock):
    """timm `ParallelThingsBlock` with sites: x + the sum of attentions of x, then x + the sum of MLPs of x.

    Each attention and MLP has a norm, a layer scale and layer sites of its own (q_1, q_2, fc1_1, ...). attn_out and
    mlp_out are the sums, after the layer scales; attn_in, mlp_in and kv would be several, and are none.
    """

    sites: Sites

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        at = self.sites.enter()
        x = at("stream_in", x)
        mask = self.sites.mask(attn_mask, is_causal)
        made = [
            branch.attn(branch.norm(x), attn_mask=mask, is_causal=is_causal, number=number)
            for number, branch in enumerate(self.attns, start=1)
        ]
        x = at("stream_mid", self.sites.followed(x) + at("attn_out", _together(self.attns, made)))
        h = self.sites.mlp(lambda x: _together(self.ffns, [branch.mlp(branch.norm(x)) for branch in self.ffns]), x)
        return at("stream_out", x + at("mlp_out", h))


def _together(branches: nn.ModuleList, made: list[torch.Tensor]) -> torch.Tensor:
    """The sum of what branches have made, scaled."""
    scaled = [branch.drop_path(branch.ls(each)) for branch, each in zip(branches, made, strict=True)]
    return torch.stack(scaled).sum(dim=0)


@describe_block.register
def _(block: ParallelThingsBlock) -> BlockSites:
    require_own_class(block, SitedParallelThingsBlock)
    layers: dict[str, Layer] = {}
    for number, (attending, feeding) in enumerate(zip(block.attns, block.ffns, strict=True), start=1):
        require_own_class(attending.attn, SitedNumberedAttention)
        _, of_attention = describe_attention(attending.attn)
        own = norm_layers(norm1=attending.norm) | of_attention | norm_layers(norm2=feeding.norm)
        for site, layer in (own | describe_mlp(feeding.mlp)).items():
            layer.site = f"{site}_{number}"
            layers[layer.site] = layer
    attention, *further = (branch.attn for branch in block.attns)
    return BlockSites(
        block,
        SitedParallelThingsBlock,
        attention,
        SitedNumberedAttention,
        layers,
        further=tuple(further),
        token_sites=("stream_in", "attn_out", "stream_mid", "mlp_out", "stream_out"),
    )
