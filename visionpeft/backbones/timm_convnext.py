"""timm `ConvNeXt`: ConvNeXt and ConvNeXt V2, DINOv3's and the image towers of OpenCLIP among them."""

import torch
import torch.nn as nn
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtStage

from visionpeft.backbones.dispatch import describe_block, describe_model, norm_layers, require_own_class
from visionpeft.backbones.layer import Layer
from visionpeft.backbones.timm_vit import backbone_with_fc
from visionpeft.backbones.tower import BETWEEN, Backbone, BlockSites, Tower
from visionpeft.sites import MapFlow, Sites


class SitedConvNeXtBlock(ConvNeXtBlock):
    """timm `ConvNeXtBlock` with sites: shortcut(x) + drop_path(gamma * mlp(norm(conv_dw x))).

    Its one branch is that of the MLP in a transformer, and its norm the one before the MLP. The pixels of the maps
    (batch, width, rows, columns) are the tokens.
    """

    sites: Sites

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map a map (batch, width, rows, columns) to the same shape."""
        at = MapFlow(self.sites, x.shape[2:], channels_first=True)
        x = at("stream_in", x)
        h = at("mlp_out", self.sites.mlp(lambda x: self.branch(at, x), x))
        if self.gamma is not None:
            h = h.mul(self.gamma.reshape(1, -1, 1, 1))
        return at("stream_out", self.drop_path(h) + self.shortcut(x))

    def branch(self, at: MapFlow, x: torch.Tensor) -> torch.Tensor:
        """What the MLP makes of the stream x (batch, width, rows, columns), before the layer scale."""
        h = self.conv_dw(x)
        if self.use_conv_mlp:
            return self.mlp(at("mlp_in", self.norm(h)))
        h = self.norm(h.permute(0, 2, 3, 1))
        return self.mlp(at("mlp_in", h, channels_first=False)).permute(0, 3, 1, 2)


@describe_block.register
def _(block: ConvNeXtBlock) -> BlockSites:
    require_own_class(block, SitedConvNeXtBlock)
    width, maps = block.conv_dw.in_channels, block.use_conv_mlp
    layers = {"conv_dw": Layer("conv_dw", "conv", block.conv_dw)} | _norm("norm2", block.norm, channels_first=maps)
    layers |= {site: Layer(site, "conv" if maps else "linear", getattr(block.mlp, site)) for site in ("fc1", "fc2")}

    def probe(num_tokens: int) -> dict:
        return {"x": torch.randn(2, width, 5, 6, dtype=torch.float64)}

    return BlockSites(
        block,
        SitedConvNeXtBlock,
        None,
        None,
        layers,
        probe,
        block.mlp.act,
        width=width,
        on_map=True,
        token_sites=("stream_in", "mlp_in", "mlp_out", "stream_out"),
    )


@describe_model.register
def _(model: ConvNeXt) -> Backbone:
    layers = _stem(model.stem)
    for index, stage in enumerate(model.stages):
        layers |= _downsample(index, stage)
    # The norm after the blocks is a part of the head, or before it where the head pools first.
    before_pooling = isinstance(getattr(model.head, "norm", None), nn.Module)
    layers |= _norm("norm", model.head.norm if before_pooling else model.norm_pre)
    tower = Tower(
        name="visual",
        path="",
        module=model,
        blocks=[describe_block(block) for stage in model.stages for block in stage.blocks],
        common_width=None,
        num_prefix_tokens=0,
        layers=layers,
        patch_size=(model.feature_info[0]["reduction"],) * 2,
        spanning=(model,),
        excluded=("head.fc.",),
        stages=tuple(len(stage.blocks) for stage in model.stages),
    )
    return backbone_with_fc(model, tower)


def _stem(stem: nn.Sequential) -> dict[str, Layer]:
    """One convolution of whole patches, or two that overlap, and a norm."""
    layers: dict[str, Layer] = {}
    for part in stem:
        if isinstance(part, nn.Conv2d):
            site = "patch_embed_2" if "patch_embed" in layers else "patch_embed"
            layers[site] = Layer(site, "conv", part)
        else:
            layers |= _norm("patch_embed_norm", part)
    return layers


def _downsample(index: int, stage: ConvNeXtStage) -> dict[str, Layer]:
    if isinstance(stage.downsample, nn.Identity):
        return {}
    norm, reduction = stage.downsample
    site = f"{BETWEEN}{index}/reduction"
    return _norm(f"{BETWEEN}{index}/norm", norm) | {site: Layer(site, "conv", reduction, target="reduction")}


def _norm(site: str, norm: nn.Module, channels_first: bool = True) -> dict[str, Layer]:
    layers = norm_layers(**{site: norm})
    for layer in layers.values():
        layer.channels_first = channels_first
    return layers
