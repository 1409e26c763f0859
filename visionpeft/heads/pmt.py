"""The decoder of PMT, a plain mask transformer on a frozen backbone."""

from dataclasses import dataclass

import torch
from timm.models.eva import EvaBlock
from torch import nn

from visionpeft.errors import ConfigurationError
from visionpeft.heads.base import DenseHead, DenseModule, Layers
from visionpeft.heads.mask_classification import (
    MaskModule,
    MaskPredictions,
    attention_mask,
    check_queries,
    rotations,
)

HEAD_WIDTH = 64


@dataclass(frozen=True)
class PMT(DenseHead):
    """Queries go through blocks of their own with the sum of four maps; each predicts a mask and its class.

    With D channels: x = sum_l s_l * (z_l + A_l GELU(B_l z_l)) of the maps z_l after a batch normalisation each, B_l
    from D to D / 2; [Q queries; x] through `depth` pre-norm blocks with D / 64 attention heads, keys without bias,
    rotary positions of the patches and layer scales, an MLP of `hidden`. Before each block and at the end, after one
    layer norm, logits of K + 1 classes (linear) and masks (an MLP of three layers on the query, times the patches at
    2^upscale times their resolution). While training, a query sees the patches of its mask alone, block by block fewer
    of them (`share_masked`); the loss is `mask_classification_loss`. What it scores is that of `MaskPredictions`.
    Queries ~ N(0, 1), scales 1, all else as PyTorch begins.

    Source: the code that its authors publish (github.com/tue-mps/pmt, MIT), of which nothing is copied; the paper was
    not read. There the decoder is also given class and register tokens, masks are lost by a schedule for six blocks
    (here by that of EoMT), and rotary positions are rescaled at random while training.

    Args:
        layers: see `DenseHead`; four.
        queries: Q.
        depth: number of blocks.
        hidden: width of their MLPs; 4 D when absent, 1,024 there for ADE20K.
        upscale: doublings of the resolution for masks: log2(patch) - 2 there, so 2 for patches of 16 pixels.
        masked: whether attention is masked while training.
    """

    number_of_maps = 4
    gives_scores = True
    layers: Layers = "quarters"
    queries: int = 100
    depth: int = 6
    hidden: int | None = None
    upscale: int = 2
    masked: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_queries(self)
        if self.depth < 1 or (self.hidden is not None and self.hidden < 1):
            raise ConfigurationError(f"PMT: depth and hidden must be at least 1, not {self.depth} and {self.hidden}")

    def build(self, channels: int, maps: int, num_classes: int) -> DenseModule:
        """The head for four maps of so many channels, newly initialised."""
        return _PMT(channels, num_classes, self)


class _PMT(MaskModule):
    def __init__(self, channels: int, num_classes: int, head: PMT):
        super().__init__(channels, num_classes, head.queries, head.upscale)
        heads = max(1, channels // HEAD_WIDTH)
        if channels % (4 * heads):
            raise ConfigurationError(f"PMT: {channels} channels make no {heads} attention heads of a multiple of 4")
        self.masked = head.masked
        self.head_width = channels // heads
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(head.number_of_maps))
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, channels // 2), nn.GELU(), nn.Linear(channels // 2, channels))
            for _ in range(head.number_of_maps)
        )
        self.scales = nn.Parameter(torch.ones(head.number_of_maps, channels))
        self.blocks = nn.ModuleList(
            EvaBlock(
                channels,
                heads,
                mlp_ratio=(head.hidden or 4 * channels) / channels,
                num_prefix_tokens=head.queries,
                rotate_half=True,
                init_values=1.0,
                norm_layer=nn.LayerNorm,
            )
            for _ in range(head.depth)
        )
        self.norm = nn.LayerNorm(channels)

    def forward(self, maps: torch.Tensor) -> MaskPredictions | torch.Tensor:
        size, queries = maps.shape[-2:], len(self.queries)
        x = 0
        for norm, lateral, scale, each in zip(self.norms, self.lateral, self.scales, maps.unbind(1), strict=True):
            tokens = norm(each).flatten(2).transpose(1, 2)
            x = x + scale * (tokens + lateral(tokens))
        x = torch.cat([self.queries.expand(len(x), -1, -1), x], dim=1)
        rope = rotations(size, self.head_width, x)
        found = MaskPredictions([], [])

        def predict() -> torch.Tensor:
            tokens = self.norm(x)
            patches = tokens[:, queries:].transpose(1, 2).unflatten(2, size)
            masks, classes = self.predict(tokens[:, :queries], patches)
            found.masks.append(masks)
            found.classes.append(classes)
            return masks

        for index, block in enumerate(self.blocks):
            mask = None
            if self.training and self.masked:
                mask = attention_mask(self.open(predict(), size, index, len(self.blocks)), before=0)
            x = block(x, rope=rope, attn_mask=mask)
        predict()
        return self.answered(found)
