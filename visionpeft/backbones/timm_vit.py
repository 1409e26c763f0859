"""timm `VisionTransformer` and its blocks: ViT, DeiT, DeiT3, DINOv2, SigLIP, CLIP towers in timm, and hybrids."""

import torch
import torch.nn as nn
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer

from visionpeft.backbones.attention import AttendsAfterNorm, AttendsToStream
from visionpeft.backbones.dispatch import architecture, describe_block, describe_model, norm_layers, pre_norm_block
from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Backbone, BlockSites, Tower
from visionpeft.sites import Sites


class SitedBlock(Block, AttendsAfterNorm):
    """timm `Block` with sites: x + drop_path(ls1(attn(norm1 x))), then x + drop_path(ls2(mlp(norm2 x)))."""

    sites: Sites

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        at = self.sites.enter()
        x = at("stream_in", x)
        h = at("attn_in", self.norm1(x))
        h = at("attn_out", self.attn(h, attn_mask=self.sites.mask(attn_mask, is_causal), is_causal=is_causal))
        x = at("stream_mid", self.sites.followed(x) + self.drop_path1(self.ls1(h)))
        h = at("mlp_out", self.sites.mlp(lambda x: self.mlp(at("mlp_in", self.norm2(x))), x))
        return at("stream_out", x + self.drop_path2(self.ls2(h)))


class SitedResPostBlock(ResPostBlock, AttendsToStream):
    """timm `ResPostBlock` with sites: the norms follow attention and MLP, so attn_in and mlp_in see the stream."""

    sites: Sites

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        at = self.sites.enter()
        x = at("stream_in", x)
        h = self.attn(at("attn_in", x), attn_mask=self.sites.mask(attn_mask, is_causal), is_causal=is_causal)
        h = self.norm1(at("attn_out", h))
        x = at("stream_mid", self.sites.followed(x) + self.drop_path1(h))
        h = self.norm2(at("mlp_out", self.sites.mlp(lambda x: self.mlp(at("mlp_in", x)), x)))
        return at("stream_out", x + self.drop_path2(h))


@describe_block.register
def _(block: Block) -> BlockSites:
    return pre_norm_block(block, SitedBlock)


@describe_block.register
def _(block: ResPostBlock) -> BlockSites:
    return pre_norm_block(block, SitedResPostBlock)


@describe_model.register
def _(model: VisionTransformer) -> Backbone:
    return timm_backbone(model, norm_pre=model.norm_pre)


def timm_backbone(model: nn.Module, **norms: nn.Module) -> Backbone:
    """Describe a timm model with `blocks`, `patch_embed`, `norm`, `fc_norm` and a classifier named `head`."""
    layers = patch_embed_layers(model) | norm_layers(**norms, norm=model.norm, fc_norm=model.fc_norm)
    tower = Tower(
        name="visual",
        path="",
        module=model,
        blocks=[describe_block(block) for block in model.blocks],
        common_width=model.embed_dim,
        num_prefix_tokens=model.num_prefix_tokens,
        layers=layers,
        patch_size=tuple(model.patch_embed.patch_size),
        spanning=(model,),
        excluded=("head.", "head_dist."),
        grid_size=None if getattr(model, "dynamic_img_size", False) else getattr(model.patch_embed, "grid_size", None),
    )
    tower.class_token = getattr(model, "cls_token", None) is not None
    pools_class_token = model.global_pool == "token" and model.num_prefix_tokens > 0 and not hasattr(model, "head_dist")
    tower.pools_class_token = pools_class_token and getattr(model, "attn_pool", None) is None
    heads = tuple(
        name for name in ("head", "head_dist") if not isinstance(getattr(model, name, nn.Identity()), nn.Identity)
    )
    return Backbone("timm", architecture(model), model, {"visual": tower}, heads)


def backbone_with_fc(model: nn.Module, tower: Tower) -> Backbone:
    """A timm model of one tower whose classifier is `head.fc`."""
    heads = () if isinstance(model.head.fc, nn.Identity) else ("head.fc",)
    return Backbone("timm", architecture(model), model, {"visual": tower}, heads)


def patch_embed_layers(model: nn.Module) -> dict[str, Layer]:
    """The layer site of the patch projection. Without a bias, its shift can go into the position embedding."""
    projection = getattr(model.patch_embed, "proj", None)
    if not isinstance(projection, nn.Conv2d | nn.Linear):
        return {}
    sink = None
    position = getattr(model, "pos_embed", None)
    if position is not None and isinstance(getattr(model.patch_embed, "norm", nn.Identity()), nn.Identity):
        prefix = position.shape[1] - model.patch_embed.num_patches
        sink = (model, "pos_embed", (slice(None), slice(prefix, None)))
    kind = "conv" if isinstance(projection, nn.Conv2d) else "linear"
    return {"patch_embed": Layer("patch_embed", kind, projection, shift_sink=sink)}
