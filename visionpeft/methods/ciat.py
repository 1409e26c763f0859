"""CIAT: Counter-Interference Adapter for Multilingual Machine Translation (Zhu et al., 2021).

https://arxiv.org/abs/2104.08154
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require, to_parameter_dtype
from visionpeft.methods.parts.bottleneck import ACTIVATIONS, Bottleneck
from visionpeft.sites import Placement


class EmbeddingAdapter(nn.Module):
    """x + A(norm(x)) on embedded tokens, A a `Bottleneck` and norm a LayerNorm of its own."""

    stackable = True
    tokenwise = True

    def __init__(self, width: int, adapter: Bottleneck):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.adapter = adapter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        return x + self.adapter(self.norm(to_parameter_dtype(x, self.norm.weight))).to(x.dtype)


@dataclass(frozen=True)
class CIAT(Method):
    """Adapters beside attention and MLP of every block and one on the embeddings: attn(u) + A(u), mlp(u) + A(u).

    A(u) = up(dropout(act(down u))) reads what the sub-layer reads, the output u of the frozen norm before it, and is
    added to what the sub-layer gives, before layer scale and residual. The embedded tokens, before the first block and
    a norm there, become x + A(norm(x)) with a norm of their own; the paper means that for languages, here it may serve
    images of another sensor. Both matrices are Glorot-uniform, biases zero, the norm one and zero: not the backbone at
    the start. Not mergeable: it is not linear.
    The authors switch off the dropout of the frozen sub-layers while adapters train; the ViTs here have none.
    Trainable on L blocks of width D and bottleneck h: 2 L (2 D h + h + D), with the embeddings 2 D h + h + 3 D more;
    2,479,936 on ViT-B/16 for h = 64 (the authors' h is D / 2).
    Source: Zhu et al., Counter-Interference Adapter for Multilingual Machine Translation, 2021, and the authors' code;
    published for translation alone.

    Args:
        bottleneck: width h.
        activation: gelu, relu, silu or identity.
        dropout: dropout in the bottleneck; 0.3 in the authors' code.
        embedding: whether there is an adapter on the embeddings.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    bottleneck: int = 64
    activation: str = "relu"
    dropout: float = 0.3
    embedding: bool = True
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.bottleneck > 0, self, "bottleneck must be a positive integer")
        words = f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}"
        require(self.activation in ACTIVATIONS, self, words)
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """An `EmbeddingAdapter` at `tokens`, and a parallel `Bottleneck` at both sub-layers of every chosen block."""
        if self.embedding:
            width = tower.blocks[0].width
            module = EmbeddingAdapter(width, self._adapter(width))
            yield Placement(tower.name, None, "tokens", module)
        for index in blocks_of(self, tower):
            for reads, add in (("attn_in", "attn_out"), ("mlp_in", "mlp_out")):
                yield Placement(tower.name, index, reads, self._adapter(tower.blocks[index].width), add=add)

    def _adapter(self, width: int) -> Bottleneck:
        adapter = Bottleneck(
            width,
            self.bottleneck,
            activation=self.activation,
            scale=1.0,
            dropout=self.dropout,
            drop_path=0.0,
            init="bert",
            serial=False,
        )
        for layer in (adapter.down, adapter.up):
            nn.init.xavier_uniform_(layer.weight)
        return adapter
