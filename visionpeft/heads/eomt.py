"""The encoder-only mask transformer: queries that go through the backbone's own last blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.heads.base import DenseHead, DenseModule, Layers
from visionpeft.heads.mask_classification import MaskModule, check_queries


@dataclass(frozen=True)
class EoMT(DenseHead):
    """Queries enter the backbone before its last `depth` blocks; each predicts a mask and its class at the end.

    They stand after class and register tokens and prompts and before the patches, have no position, and are normalised
    with the other tokens after the last block. With D channels and the normalised queries q and patches x: logits of
    K + 1 classes are linear in q, those of masks an MLP of three layers on q times x at 2^upscale times its resolution.
    While training, the same is predicted before each of these blocks, where a query then sees the patches of its mask
    alone, block by block fewer of them (`share_masked`); the loss is `mask_classification_loss`. What it scores is that
    of `MaskPredictions`. Queries ~ N(0, 1), all else as PyTorch begins.
    Q D + (D + 1)(K + 1) + 3 D (D + 1) + upscale (4 D^2 + 12 D) values.

    What acts at the weights of those blocks (LoRA) or on all their tokens (AdaptFormer, deep prompts as keys) acts on
    queries, too; what acts on patches alone (Convpass, Mona) leaves them out. The authors fine-tune everything, and say
    that a frozen backbone does not do well; with adapters it is unpublished.

    Kerssies et al. 2025, "Your ViT is Secretly an Image Segmentation Model" (arXiv 2503.19108).

    Args:
        layers: one, the last block; see `DenseHead`.
        queries: Q.
        depth: number of the last blocks that queries go through: 4 of ViT-L's 24 there, 3 of ViT-B's 12.
        upscale: doublings of the resolution for masks: log2(patch) - 2 there, so 2 for patches of 16 pixels.
        masked: whether attention is masked while training.
    """

    number_of_maps = 1
    gives_scores = True
    layers: Layers = 1
    queries: int = 100
    depth: int = 4
    upscale: int = 2
    masked: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_queries(self)
        if self.depth < 1:
            raise ConfigurationError(f"EoMT: depth must be at least 1, not {self.depth}")

    def build(self, channels: int, maps: int, num_classes: int) -> DenseModule:
        """The head for maps of so many channels, newly initialised."""
        return _EoMT(channels, num_classes, self)

    def build_on_stages(self, channels: Sequence[int], num_classes: int) -> DenseModule:
        """Refuse: their blocks see windows of a map, or take no tokens.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "the queries of EoMT go through blocks in which all tokens see each other, which a backbone in stages does "
            "not have; use UPerNet, DPT or LinearSegmentation there"
        )


class _EoMT(MaskModule):
    def __init__(self, channels: int, num_classes: int, head: EoMT):
        super().__init__(channels, num_classes, head.queries, head.upscale)
        self.queried_blocks = head.depth
        self.masked = head.masked

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        raise UnsupportedError("the queries of EoMT go through blocks of a backbone; let a DensePredictor compute it")
