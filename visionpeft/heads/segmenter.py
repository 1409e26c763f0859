"""The mask transformer of Segmenter."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn

from visionpeft.errors import ConfigurationError
from visionpeft.heads.base import DenseHead, DenseModule, Layers, checked_share

HEAD_WIDTH = 64


@dataclass(frozen=True)
class Segmenter(DenseHead):
    """A token for each class goes through two blocks of a transformer with the patches; a logit is their agreement.

    With D channels and K classes: z = [W x + b; c] of the N patches x and the class tokens c, `depth` pre-norm blocks
    with D / 64 attention heads and an MLP of 4 D, a layer normalisation; then logits = LN_K(normalise(z_x P) .
    normalise(z_c Q)^T), both normalised to length 1. W, c and the blocks' matrices ~ N(0, .02^2) truncated, P and Q ~
    N(0, 1 / D). D (D + 1) + depth (12 D^2 + 13 D) + 2 D + K D + 2 D^2 + 2 K values.

    Strudel et al. 2021, "Segmenter: Transformer for Semantic Segmentation" (arXiv 2105.05633).

    Args:
        layers: see `DenseHead`; one.
        depth: number of blocks.
        dropout: in the blocks, while training.
    """

    number_of_maps = 1
    layers: Layers = 1
    depth: int = 2
    dropout: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        checked_share(self, "dropout")
        if self.depth < 1:
            raise ConfigurationError(f"Segmenter: depth must be at least 1, not {self.depth}")

    def build(self, channels: int, maps: int, num_classes: int) -> DenseModule:
        """The head for one map of so many channels, newly initialised."""
        return _Segmenter(channels, num_classes, self.depth, self.dropout)


class _Segmenter(DenseModule):
    def __init__(self, channels: int, num_classes: int, depth: int, dropout: float):
        super().__init__()
        heads = max(1, channels // HEAD_WIDTH)
        if channels % heads:
            raise ConfigurationError(f"Segmenter: {channels} channels cannot be shared by {heads} attention heads")
        self.enter = nn.Linear(channels, channels)
        self.tokens = nn.Parameter(torch.zeros(num_classes, channels))
        self.blocks = nn.Sequential(
            *(
                Block(channels, heads, qkv_bias=True, proj_drop=dropout, attn_drop=dropout, norm_layer=nn.LayerNorm)
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(channels)
        self.of_patches = nn.Parameter(channels**-0.5 * torch.randn(channels, channels))
        self.of_classes = nn.Parameter(channels**-0.5 * torch.randn(channels, channels))
        self.norm_of_masks = nn.LayerNorm(num_classes)
        nn.init.trunc_normal_(self.tokens, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        size, classes = maps.shape[-2:], len(self.tokens)
        patches = self.enter(maps.squeeze(1).flatten(2).transpose(1, 2))
        x = torch.cat([patches, self.tokens.expand(len(patches), -1, -1)], dim=1)
        x = self.norm(self.blocks(x))
        patches = F.normalize(x[:, :-classes] @ self.of_patches, dim=-1)
        tokens = F.normalize(x[:, -classes:] @ self.of_classes, dim=-1)
        masks = self.norm_of_masks(patches @ tokens.transpose(1, 2))
        return masks.transpose(1, 2).unflatten(2, size)
