"""AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition (Chen et al., 2022).

https://arxiv.org/abs/2205.13535
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks, Overrides
from visionpeft.methods.parts.base import Method, blocks_of, require
from visionpeft.methods.parts.bottleneck import Bottleneck
from visionpeft.sites import Placement


@dataclass(frozen=True)
class AdaptFormer(Method):
    """A bottleneck beside the MLP: y + mlp(norm2 y) + scale * up(dropout(relu(down y))), y the stream after attention.

    The branch reads y itself, not its normalisation: the authors' code and their answer to readers, against the figure
    of the first version. down is Kaiming-uniform with a = sqrt(5), everything else zero: no change at the start.
    The authors' backbones have no layer scale. Where a block has one, as in DINOv2, the branch is added after it, as in
    the code of Adapter+; with `before_scaling` it is added to what the MLP gives, before layer scale and drop path,
    which then act on it: y + drop_path(gamma * (mlp(norm2 y) + scale * up(...))). With gamma near 1e-5, where such
    backbones begin, its gradient is as small.
    A block of a ConvNeXt has no attention and one branch, that of the MLP, to which its depth-wise convolution belongs:
    there y is what enters the block.
    Not mergeable: it is not linear. Trainable: L (2 D h + h + D); 1,189,632 on ViT-B/16 for h = 64.
    Source: Chen et al., AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition, 2022.

    Args:
        bottleneck: width h.
        scale: a fixed number, or "learned" for one trained number per block that starts at 1.
        dropout: dropout in the bottleneck; the paper's image runs use 0.1.
        before_scaling: add before layer scale and drop path (and the norm after the MLP, where there is one).
        overrides: other bottlenecks for some blocks, such as {"last:4": 32}.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    bottleneck: int = 64
    scale: float | str = 0.1
    dropout: float = 0.1
    before_scaling: bool = False
    overrides: dict[str, int] = field(default_factory=dict)
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        widths = [self.bottleneck, *self.overrides.values()]
        require(all(h > 0 for h in widths), self, "bottleneck must be a positive integer")
        require(not isinstance(self.scale, str) or self.scale == "learned", self, "scale must be a number or 'learned'")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One parallel `Bottleneck` in every chosen block."""
        widths = Overrides(self.bottleneck, self.overrides, tower, (), "AdaptFormer overrides")
        for index in blocks_of(self, tower):
            module = Bottleneck(
                width=tower.blocks[index].width,
                bottleneck=widths.at(index),
                activation="relu",
                scale=self.scale,
                dropout=self.dropout,
                drop_path=0.0,
                init="lora",
                serial=False,
            )
            # A block that is one branch alone, that of the MLP, has no stream in the middle: its branch begins at its
            # entrance.
            reads = "stream_mid" if tower.blocks[index].has("stream_mid") else "stream_in"
            add = "mlp_out" if self.before_scaling else "stream_out"
            yield Placement(tower.name, index, reads, module, add=add)
