"""MAM adapter: Towards a Unified View of Parameter-Efficient Transfer Learning (He et al., 2022).

https://arxiv.org/abs/2110.04366
"""

from collections.abc import Iterator
from dataclasses import dataclass

from visionpeft.backbones.tower import Tower
from visionpeft.methods.adaptformer import AdaptFormer
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method
from visionpeft.methods.prefix_tuning import PrefixTuning
from visionpeft.sites import Placement, Shared


@dataclass(frozen=True)
class MAM(Method):
    """Mix-and-match adapter: `PrefixTuning` in the attention and a scaled `AdaptFormer` beside the MLP of every block.

    softmax(q [P_k; k]^T) [P_v; v], and y + mlp(norm2 y) + scale * up(dropout(relu(down y))) with y the stream after
    attention. Prefixes are N(0, 0.02) and made by no MLP; up is zero at the start. Not mergeable.
    Trainable on L blocks of width D: 2 L num_tokens D + L (2 D h + h + D); 1,742,592 on ViT-B/16.
    Source: He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, 2022.

    Args:
        num_tokens: keys and values per block.
        bottleneck: width h; the paper has 512 in language models.
        scale: factor of the adapter: a fixed number, or "learned".
        dropout: dropout in the bottleneck.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    num_tokens: int = 30
    bottleneck: int = 64
    scale: float | str = 4.0
    dropout: float = 0.0
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.parts()  # which refuse values that make no sense

    def parts(self) -> tuple[Method, ...]:
        """The two methods it is made of."""
        adapter = AdaptFormer(self.bottleneck, self.scale, self.dropout, blocks=self.blocks)
        return PrefixTuning(self.num_tokens, blocks=self.blocks), adapter

    def place(self, tower: Tower) -> Iterator[Placement | Shared]:
        """What the two methods place."""
        for part in self.parts():
            yield from part.place(tower)
